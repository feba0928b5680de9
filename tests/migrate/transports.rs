//! A guest that writes continuously arrives byte for byte over every transport.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vhost_migrate::migrate::{GuestLocation, MigrateError, MigrationEvent};
use vhost_migrate::stream::Uri;
use vhost_migrate::unstable::with_causes;

use crate::guest::{Guest, GuestFault, REFUSAL_REASON, RefusalPoint};
use crate::harness::{
    Destination, DestinationOutcome, MigrationSetup, TempFolder, assert_moved, assert_source_unharmed, migrate_out,
    migrate_to, uri,
};

/// 6 MiB. The fifth of five channels has none of it.
const PAGES: u64 = 1536;

/// Migrates there and back; every byte is checked on each arrival.
fn migrate_there_and_back(to: &Uri, setup: &MigrationSetup) {
    let (guest, _) = migrate_to(Guest::running(PAGES), to, setup);
    migrate_to(guest, to, setup);
}

#[test]
fn a_writing_guest_arrives_over_a_unix_socket() {
    migrate_there_and_back(&TempFolder::new().unix("socket"), &MigrationSetup::new());
}

#[test]
fn a_writing_guest_arrives_compressed_over_two_unix_channels() {
    migrate_there_and_back(&TempFolder::new().unix("socket"), &MigrationSetup::new().channels(2).codec("zstd:1"));
}

#[test]
fn a_writing_guest_arrives_over_tcp() {
    migrate_there_and_back(&uri("tcp:127.0.0.1:0"), &MigrationSetup::new());
}

#[test]
fn a_writing_guest_arrives_compressed_over_five_tcp_channels() {
    migrate_there_and_back(&uri("tcp:127.0.0.1:0"), &MigrationSetup::new().channels(5).codec("zstd:1"));
}

#[test]
fn a_writing_guest_arrives_over_inherited_sockets() {
    for setup in [MigrationSetup::new(), MigrationSetup::new().codec("zstd:1")] {
        let mut guest = Guest::running(PAGES);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let fd = |socket: &UnixStream| Uri::Fd(socket.as_raw_fd());
        let destination = Destination::at(&fd(&theirs));
        let left = migrate_out(&mut guest, &fd(&ours), &setup);
        assert_moved(left, &guest, destination);
    }
}

#[test]
fn a_writing_guest_arrives_over_bidirectional_commands() {
    let folder = TempFolder::new();
    let (up, down) = (folder.path("up"), folder.path("down"));
    for pipe in [&up, &down] {
        nix::unistd::mkfifo(pipe.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    // A command in the background has no input except the given one.
    let carry = |write: &str, read: &str| uri(&format!("exec:exec 3<&0; cat <&3 >{write} & exec cat <{read}"));
    for setup in [MigrationSetup::new(), MigrationSetup::new().codec("zstd:1")] {
        let mut guest = Guest::running(PAGES);
        let destination = Destination::at(&carry(&down, &up));
        let left = migrate_out(&mut guest, &carry(&up, &down), &setup);
        assert_moved(left, &guest, destination);
    }
}

/// Saves a guest and restores it.
fn save_and_restore(to: &Uri, from: &Uri, setup: &MigrationSetup) -> DestinationOutcome {
    let mut guest = Guest::running(PAGES);
    migrate_out(&mut guest, to, setup).outcome.unwrap();
    guest.assert_released();
    Destination::at(from).join()
}

#[test]
fn a_writing_guest_is_saved_to_a_file_and_restored_twice() {
    let folder = TempFolder::new();
    let file = uri(&format!("file:{}", folder.path("guest")));
    for setup in [MigrationSetup::new(), MigrationSetup::new().codec("zstd:1")] {
        save_and_restore(&file, &file, &setup).guest();
        Destination::at(&file).join().guest();
    }
    let (guest, _) = migrate_to(Destination::at(&file).join().guest(), &folder.unix("on"), &MigrationSetup::new());
    guest.wait_for_write();
}

#[test]
fn a_writing_guest_is_saved_by_a_command_and_restored_by_another() {
    let folder = TempFolder::new();
    let (to, from) = (uri(&format!("exec:cat >{}", folder.path("guest"))), folder.path("guest"));
    for setup in [MigrationSetup::new(), MigrationSetup::new().codec("zstd:1")] {
        let mut guest = Guest::running(PAGES);
        // A successful command does not prove where the guest is.
        let failure = migrate_out(&mut guest, &to, &setup.one_way()).failure();
        assert_eq!(failure.location, GuestLocation::OutcomeUnknown, "{failure}");
        guest.assert_kept_paused();
        Destination::at(&uri(&format!("exec:cat {from}"))).join().guest();
    }
}

#[test]
fn a_paused_guest_arrives_paused_over_a_socket_and_from_a_file() {
    let mut guest = Guest::idle(PAGES);
    let (folder, destination) = Destination::start();
    migrate_out(&mut guest, &destination.uri, &MigrationSetup::new()).outcome.unwrap();
    let mut guest = destination.join().paused();
    let file = uri(&format!("file:{}", folder.path("guest")));
    migrate_out(&mut guest, &file, &MigrationSetup::new()).outcome.unwrap();
    let mut guest = Destination::at(&file).join().paused();
    guest.start();
    let (guest, _) = migrate_to(guest, &folder.unix("on"), &MigrationSetup::new());
    guest.wait_for_write();
}

#[test]
fn a_paused_guest_whose_migration_fails_stays_paused() {
    let folder = TempFolder::new();
    let mut guest = Guest::idle(PAGES);
    let destination = Destination::new(&folder.unix("socket"), Some(RefusalPoint::Restore));
    let failure = migrate_out(&mut guest, &destination.uri, &MigrationSetup::new()).failure();
    assert_eq!(failure.location, GuestLocation::PausedHere, "{failure}");
    assert_eq!((guest.calls.pauses, guest.calls.resumes, guest.is_running()), (1, 1, false));
    destination.join().expect_failure();
    guest.check().unwrap();
}

/// A guest sent one way may run at the other end: the source keeps it and decides nothing.
#[test]
fn a_one_way_migration_has_an_unknown_outcome() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    for (to, from) in [(ours.as_raw_fd(), theirs.as_raw_fd()), (writer.as_raw_fd(), reader.as_raw_fd())] {
        let mut guest = Guest::running(PAGES);
        let destination = Destination::at(&Uri::Fd(from));
        let failure = migrate_out(&mut guest, &Uri::Fd(to), &MigrationSetup::new().one_way()).failure();
        assert_eq!(failure.location, GuestLocation::OutcomeUnknown, "{failure}");
        assert!(matches!(failure.error, MigrateError::OneWay), "{failure}");
        guest.assert_kept_paused();
        destination.join().guest();
    }
}

#[test]
fn a_pipe_is_refused_without_one_way() {
    let (_reader, writer) = nix::unistd::pipe().unwrap();
    let mut guest = Guest::running(PAGES);
    let failure = migrate_out(&mut guest, &Uri::Fd(writer.as_raw_fd()), &MigrationSetup::new()).failure();
    assert!(with_causes(&failure).to_string().contains("--one-way"), "{failure}");
    assert_source_unharmed(guest, &failure);
}

#[test]
fn a_complete_file_behind_an_fd_uri_holds_the_guest() {
    let folder = TempFolder::new();
    let file = std::fs::File::create(folder.path("guest")).unwrap();
    let mut guest = Guest::running(PAGES);
    migrate_out(&mut guest, &Uri::Fd(file.as_raw_fd()), &MigrationSetup::new()).outcome.unwrap();
    guest.assert_released();
    Destination::at(&uri(&format!("file:{}", folder.path("guest")))).join().guest();
}

#[test]
fn with_the_dirty_log_off_the_guest_check_finds_lost_pages() {
    let mut guest = Guest::running(PAGES).with_fault(GuestFault::LogOff);
    let (_folder, destination) = Destination::start();
    let failure = migrate_out(&mut guest, &destination.uri, &MigrationSetup::new()).failure();
    let MigrateError::Destination(words) = &failure.error else { panic!("{failure}") };
    assert!(words.contains("memory at 0x") && !words.contains(REFUSAL_REASON), "{words}");
    destination.join().expect_failure();
    assert_source_unharmed(guest, &failure);
}

#[test]
fn source_and_destination_report_the_same_page_and_byte_counts() {
    for channels in [1, 2, 5] {
        let mut guest = Guest::running(PAGES);
        let (_folder, destination) = Destination::start();
        let left = migrate_out(&mut guest, &destination.uri, &MigrationSetup::new().channels(channels));
        let report = left.outcome.unwrap();
        let arrived = destination.join();

        let received = arrived.outcome.as_ref().unwrap();
        assert_eq!(report.guest_bytes, PAGES * 4096);
        assert_eq!(report.pages_sent, received.pages.pages());
        assert_eq!(report.zero_pages, received.pages.zero_pages);
        assert!(report.zero_pages > 0 && report.pages_sent > PAGES);
        assert_eq!(report.wire_bytes, arrived.bytes);
        assert!(report.wire_bytes > (report.pages_sent - report.zero_pages) * 4096);
        assert!(0.0 < report.downtime_ms && report.downtime_ms < report.total_ms);

        let rounds = left.events.iter().filter_map(|event| match event {
            MigrationEvent::Round(round) => Some(round.clone()),
            _ => None,
        });
        let rounds: Vec<_> = rounds.collect();
        assert_eq!(report.rounds as usize, rounds.len() + 1);
        assert!(rounds.iter().zip(0..).all(|(round, number)| round.round == number));
        assert_eq!(rounds[0].data_pages + rounds[0].zero_pages, PAGES);
        for (round, next) in rounds.iter().zip(&rounds[1..]) {
            assert_eq!(round.pages_left, next.data_pages + next.zero_pages);
        }
        let in_rounds: u64 = rounds.iter().map(|round| round.data_pages + round.zero_pages).sum();
        let left_over = rounds[rounds.len() - 1].pages_left;
        assert!(report.pages_sent - in_rounds >= left_over, "the last round sends what was left, and what came since");
        assert!(rounds.iter().map(|round| round.wire_bytes).sum::<u64>() < report.wire_bytes);
        arrived.guest();
    }
}
