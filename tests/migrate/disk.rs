//! Files and commands that fail: the guest continues, and no partial file is left.

use std::process::Command;

use vhost_migrate::migrate::{GuestLocation, MigrateError, MigrationEvent, migrate};
use vhost_migrate::stream::{self, StreamError};
use vhost_migrate::unstable::with_causes;

use crate::guest::{Calls, Guest, GuestFault};
use crate::harness::{Destination, MigrationSetup, TempFolder, assert_source_unharmed, migrate_out, stream_error, uri};

const PAGES: u64 = 512;

/// Migrates to `to`, which fails and leaves the guest unharmed. Returns the error text.
fn failing_migration_error(to: &str, setup: &MigrationSetup) -> String {
    let mut guest = Guest::running(PAGES);
    let failure = migrate_out(&mut guest, &uri(to), setup).failure();
    assert_source_unharmed(guest, &failure);
    with_causes(&failure).to_string()
}

#[test]
fn an_error_names_the_file_that_cannot_be_created_and_the_reason() {
    let folder = TempFolder::new();
    std::fs::write(folder.path("file"), "").unwrap();
    let words = failing_migration_error(&format!("file:{}", folder.path("nowhere/guest")), &MigrationSetup::new());
    assert!(words.contains("there is no such path") && words.contains("nowhere/guest"), "{words}");
    let words = failing_migration_error(&format!("file:{}", folder.path("file/guest")), &MigrationSetup::new());
    assert!(words.contains("file/guest"), "{words}");
    let words = failing_migration_error(&format!("file:{}", folder.path("")), &MigrationSetup::new());
    assert!(words.contains("file:"), "{words}");
}

#[test]
fn a_full_disk_leaves_the_guest_at_its_source() {
    let words = failing_migration_error("file:/dev/full", &MigrationSetup::new());
    assert!(words.contains("no space left"), "{words}");
    failing_migration_error("exec:cat >/dev/full", &MigrationSetup::new().one_way());
    failing_migration_error("exec:cat >/dev/full", &MigrationSetup::new());
}

#[test]
fn a_command_that_fails_before_the_commit_leaves_the_guest_at_its_source() {
    failing_migration_error("exec:exit 3", &MigrationSetup::new().one_way());
    failing_migration_error("exec:head -c 500000 >/dev/null", &MigrationSetup::new().one_way());
    failing_migration_error("exec:kill -9 $$", &MigrationSetup::new());
}

#[test]
fn a_command_that_fails_after_the_commit_leaves_an_unknown_outcome() {
    for (command, why) in [("cat >/dev/null; exit 3", "exit status: 3"), ("cat >/dev/null", "one way")] {
        let mut guest = Guest::running(PAGES);
        let failure =
            migrate_out(&mut guest, &uri(&format!("exec:{command}")), &MigrationSetup::new().one_way()).failure();
        assert_eq!(failure.location, GuestLocation::OutcomeUnknown, "{failure}");
        assert!(with_causes(&failure).to_string().contains(why), "{failure}");
        guest.assert_kept_paused();
        guest.resume_unharmed();
    }
}

/// Runs itself again with a file size limit of 1.5 MiB, like a file system that fills up: the memory of the guest is in
/// two files of 1 MiB.
#[test]
fn a_disk_that_fills_up_during_a_save_leaves_no_file_and_a_running_guest() {
    const LIMITED: &str = "VHOST_MIGRATE_TEST_LIMITED";
    if std::env::var_os(LIMITED).is_none() {
        let name = "disk::a_disk_that_fills_up_during_a_save_leaves_no_file_and_a_running_guest";
        let mut again = Command::new("sh");
        // In units of 512 bytes. The signal would end the process before the error occurs.
        again.args(["-c", "trap '' XFSZ; ulimit -f 3072; exec \"$0\" --exact \"$1\""]);
        let output = again.arg(std::env::current_exe().unwrap()).arg(name).env(LIMITED, "1").output().unwrap();
        let words = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && words.contains("1 passed"), "{words}");
        return;
    }
    let folder = TempFolder::new();
    let file = format!("file:{}", folder.path("guest"));
    let mut guest = Guest::running(PAGES);
    let failure = migrate_out(&mut guest, &uri(&file), &MigrationSetup::new()).failure();
    assert!(matches!(stream_error(&failure), StreamError::Io(_) | StreamError::DiskFull), "{failure}");
    assert!(folder.is_empty());
    assert_source_unharmed(guest, &failure);
}

#[test]
fn the_sent_rounds_are_on_disk_before_the_guest_stops() {
    let folder = TempFolder::new();
    let setup = MigrationSetup::new();
    let connection = stream::connect(&uri(&format!("file:{}", folder.path("guest"))), &setup.options).unwrap();
    let channel = connection.channels[0].clone();
    let (mut sent, mut left) = (0, None);
    let mut guest = Guest::running(PAGES);
    migrate(&mut guest, connection, &setup.parameters, &mut |event| match event {
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
fn a_snapshot_can_be_restored_and_its_guest_goes_on() {
    let folder = TempFolder::new();
    let file = uri(&format!("file:{}", folder.path("guest")));
    let mut setup = MigrationSetup::new();
    setup.parameters.continue_here = true;
    let mut guest = Guest::running(PAGES);
    for times in 1..=2 {
        migrate_out(&mut guest, &file, &setup).outcome.unwrap();
        guest.wait_for_write();
        assert_eq!(guest.calls, Calls { pauses: times, resumes: times, releases: 0 });
        Destination::at(&file).join().guest();
    }
    // Over other transports the guest would run twice.
    let destination = Destination::at(&folder.unix("socket"));
    let failure = migrate_out(&mut guest, &destination.uri, &setup).failure();
    assert!(matches!(failure.error, MigrateError::NotAFile), "{failure}");
    assert_eq!(guest.calls.pauses, 2);
    destination.cancel().expect_failure();
    guest.stop();
    guest.check().unwrap();
}

#[test]
fn a_failed_save_leaves_the_existing_file_unchanged() {
    let folder = TempFolder::new();
    let file = uri(&format!("file:{}", folder.path("guest")));
    migrate_out(&mut Guest::running(PAGES), &file, &MigrationSetup::new()).outcome.unwrap();
    let before = std::fs::read(folder.path("guest")).unwrap();

    let mut guest = Guest::running(PAGES).with_fault(GuestFault::StateFails);
    let failure = migrate_out(&mut guest, &file, &MigrationSetup::new()).failure();
    assert!(matches!(failure.error, MigrateError::Vm { .. }), "{failure}");
    assert_source_unharmed(guest, &failure);

    let entries = std::fs::read_dir(std::path::Path::new(&folder.path("guest")).parent().unwrap()).unwrap();
    assert_eq!(entries.count(), 1, "half a file is left");
    assert!(before == std::fs::read(folder.path("guest")).unwrap());
    Destination::at(&file).join().guest();
}
