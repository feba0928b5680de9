//! Files and commands that can't take a guest: it goes on, and no half file is left.

use std::process::Command;

use vhost_migrate::migrate::{GuestLocation, MigrateError, MigrationEvent, migrate};
use vhost_migrate::stream::{StreamError, StreamOptions, transport};

use crate::guest::{Calls, Guest, Trouble};
use crate::trip::{Destination, How, Place, assert_nothing_happened, leave, stream_error, uri};

const PAGES: u64 = 512;

/// A migration to `to` fails, and is as if it had not been. Returns the error's words.
fn in_vain(to: &str, how: &How) -> String {
    let mut guest = Guest::running(PAGES);
    let failure = leave(&mut guest, &uri(to), how).failure();
    assert_nothing_happened(guest, &failure);
    failure.to_string()
}

#[test]
fn a_file_that_cannot_be_made_is_named_with_the_reason() {
    let place = Place::new();
    std::fs::write(place.path("file"), "").unwrap();
    let words = in_vain(&format!("file:{}", place.path("nowhere/guest")), &How::new());
    assert!(words.contains("there is no such path") && words.contains("nowhere/guest"), "{words}");
    let words = in_vain(&format!("file:{}", place.path("file/guest")), &How::new());
    assert!(words.contains("file/guest"), "{words}");
    let words = in_vain(&format!("file:{}", place.path("")), &How::new());
    assert!(words.contains("file:"), "{words}");
}

#[test]
fn a_full_disk_leaves_the_guest_where_it_is() {
    let words = in_vain("file:/dev/full", &How::new());
    assert!(words.contains("no space left"), "{words}");
    in_vain("exec:cat >/dev/full", &How::new().one_way());
    in_vain("exec:cat >/dev/full", &How::new());
}

#[test]
fn a_command_that_fails_before_the_commit_has_not_taken_the_guest() {
    in_vain("exec:exit 3", &How::new().one_way());
    in_vain("exec:head -c 500000 >/dev/null", &How::new().one_way());
    in_vain("exec:kill -9 $$", &How::new());
}

#[test]
fn a_command_that_fails_after_the_commit_may_have_handed_the_guest_on() {
    for (command, why) in [("cat >/dev/null; exit 3", "exit status: 3"), ("cat >/dev/null", "one way")] {
        let mut guest = Guest::running(PAGES);
        let failure = leave(&mut guest, &uri(&format!("exec:{command}")), &How::new().one_way()).failure();
        assert_eq!(failure.location, GuestLocation::OutcomeUnknown, "{failure}");
        assert!(failure.to_string().contains(why), "{failure}");
        guest.assert_kept();
        guest.go_on();
    }
}

/// Runs itself again with no file allowed to be larger than 1.5 MiB, as on a file system that fills up half-way: the
/// memory of the guest is in two files of 1 MiB.
#[test]
fn a_disk_that_fills_up_half_way_leaves_neither_half_a_file_nor_a_stopped_guest() {
    const LIMITED: &str = "VHOST_MIGRATE_TEST_LIMITED";
    if std::env::var_os(LIMITED).is_none() {
        let name = "disk::a_disk_that_fills_up_half_way_leaves_neither_half_a_file_nor_a_stopped_guest";
        let mut again = Command::new("sh");
        // In units of 512 bytes. The signal would end the process before the error comes.
        again.args(["-c", "trap '' XFSZ; ulimit -f 3072; exec \"$0\" --exact \"$1\""]);
        let output = again.arg(std::env::current_exe().unwrap()).arg(name).env(LIMITED, "1").output().unwrap();
        let words = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && words.contains("1 passed"), "{words}");
        return;
    }
    let place = Place::new();
    let file = format!("file:{}", place.path("guest"));
    let mut guest = Guest::running(PAGES);
    let failure = leave(&mut guest, &uri(&file), &How::new()).failure();
    assert!(matches!(stream_error(&failure), StreamError::Io(_) | StreamError::DiskFull), "{failure}");
    assert!(place.is_empty());
    assert_nothing_happened(guest, &failure);
}

#[test]
fn what_was_sent_while_the_guest_ran_is_on_disk_when_it_stops() {
    let place = Place::new();
    let how = How::new();
    let StreamOptions { limiter, cancel, .. } = &how.options;
    let connection = transport::connect(&uri(&format!("file:{}", place.path("guest"))), &how.options).unwrap();
    let channel = connection.channels[0].clone();
    let (mut sent, mut left) = (0, None);
    let mut guest = Guest::running(PAGES);
    migrate(&mut guest, connection, &how.parameters, limiter, cancel, &mut |event| match event {
        MigrationEvent::Round(_) => sent = channel.bytes_sent(),
        MigrationEvent::Switchover { .. } => left = Some(channel.unsynced_bytes()),
        _ => {}
    })
    .unwrap();
    assert!(sent > 1 << 20, "{sent}");
    assert_eq!(left, Some(0), "bytes left to sync with the guest stopped, of {sent}");
    assert_eq!(channel.unsynced_bytes(), 0);
}

#[test]
fn a_guest_that_is_saved_to_go_on_does_and_what_is_saved_is_a_guest_too() {
    let place = Place::new();
    let file = uri(&format!("file:{}", place.path("guest")));
    let mut how = How::new();
    how.parameters.continue_here = true;
    let mut guest = Guest::running(PAGES);
    for times in 1..=2 {
        leave(&mut guest, &file, &how).outcome.unwrap();
        guest.beat();
        assert_eq!(guest.calls, Calls { pauses: times, resumes: times, releases: 0 });
        Destination::at(&file).join().guest();
    }
    // Over anything else it would run twice.
    let destination = Destination::at(&place.unix("socket"));
    let failure = leave(&mut guest, &destination.uri, &how).failure();
    assert!(matches!(failure.error, MigrateError::NotAFile), "{failure}");
    assert_eq!(guest.calls.pauses, 2);
    destination.cancel().nobody();
    guest.stop();
    guest.check().unwrap();
}

#[test]
fn a_save_that_fails_leaves_the_file_that_was_there() {
    let place = Place::new();
    let file = uri(&format!("file:{}", place.path("guest")));
    leave(&mut Guest::running(PAGES), &file, &How::new()).outcome.unwrap();
    let before = std::fs::read(place.path("guest")).unwrap();

    let mut guest = Guest::running(PAGES).with(Trouble::StateFails);
    let failure = leave(&mut guest, &file, &How::new()).failure();
    assert!(matches!(failure.error, MigrateError::Vm { .. }), "{failure}");
    assert_nothing_happened(guest, &failure);

    let folder = std::fs::read_dir(std::path::Path::new(&place.path("guest")).parent().unwrap()).unwrap();
    assert_eq!(folder.count(), 1, "half a file is left");
    assert!(before == std::fs::read(place.path("guest")).unwrap());
    Destination::at(&file).join().guest();
}
