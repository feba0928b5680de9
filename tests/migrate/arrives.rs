//! A guest that writes all the time arrives byte for byte, whatever carries it.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vhost_migrate::migrate::{GuestLocation, MigrateError, MigrationEvent};
use vhost_migrate::stream::Uri;

use crate::guest::{Guest, NO_ROOM, Refusal, Trouble};
use crate::trip::{Arrived, Destination, How, Place, assert_nothing_happened, leave, travel, uri};

/// 6 MiB. The fifth of five channels has none of it.
const PAGES: u64 = 1536;

/// There and back again, every byte checked on each arrival.
fn there_and_back(to: &Uri, how: &How) {
    let (guest, _) = travel(Guest::running(PAGES), to, how);
    travel(guest, to, how);
}

#[test]
fn a_writing_guest_arrives_over_a_unix_socket() {
    there_and_back(&Place::new().unix("socket"), &How::new());
}

#[test]
fn a_writing_guest_arrives_compressed_over_two_unix_channels() {
    there_and_back(&Place::new().unix("socket"), &How::new().channels(2).codec("zstd:1"));
}

#[test]
fn a_writing_guest_arrives_over_tcp() {
    there_and_back(&uri("tcp:127.0.0.1:0"), &How::new());
}

#[test]
fn a_writing_guest_arrives_compressed_over_five_tcp_channels() {
    there_and_back(&uri("tcp:127.0.0.1:0"), &How::new().channels(5).codec("zstd:1"));
}

#[test]
fn a_writing_guest_arrives_over_inherited_sockets() {
    for how in [How::new(), How::new().codec("zstd:1")] {
        let mut guest = Guest::running(PAGES);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let fd = |socket: &UnixStream| Uri::Fd(socket.as_raw_fd());
        let destination = Destination::at(&fd(&theirs));
        let left = leave(&mut guest, &fd(&ours), &how);
        left.outcome.unwrap();
        guest.assert_gone();
        destination.join().guest();
    }
}

#[test]
fn a_writing_guest_arrives_over_commands_that_carry_both_ways() {
    let place = Place::new();
    let (up, down) = (place.path("up"), place.path("down"));
    for pipe in [&up, &down] {
        nix::unistd::mkfifo(pipe.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    // A command in the background has no input but what it is given.
    let carry = |write: &str, read: &str| uri(&format!("exec:exec 3<&0; cat <&3 >{write} & exec cat <{read}"));
    for how in [How::new(), How::new().codec("zstd:1")] {
        let mut guest = Guest::running(PAGES);
        let destination = Destination::at(&carry(&down, &up));
        let left = leave(&mut guest, &carry(&up, &down), &how);
        left.outcome.unwrap();
        guest.assert_gone();
        destination.join().guest();
    }
}

/// Sends a guest where it does not run, and has it restored from there.
fn save_and_restore(to: &Uri, from: &Uri, how: &How) -> Arrived {
    let mut guest = Guest::running(PAGES);
    leave(&mut guest, to, how).outcome.unwrap();
    guest.assert_gone();
    Destination::at(from).join()
}

#[test]
fn a_writing_guest_is_saved_to_a_file_and_restored_twice() {
    let place = Place::new();
    let file = uri(&format!("file:{}", place.path("guest")));
    for how in [How::new(), How::new().codec("zstd:1")] {
        save_and_restore(&file, &file, &how).guest();
        Destination::at(&file).join().guest();
    }
    let (guest, _) = travel(Destination::at(&file).join().guest(), &place.unix("on"), &How::new());
    guest.beat();
}

#[test]
fn a_writing_guest_is_saved_by_a_command_and_restored_by_another() {
    let place = Place::new();
    let (to, from) = (uri(&format!("exec:cat >{}", place.path("guest"))), place.path("guest"));
    for how in [How::new(), How::new().codec("zstd:1")] {
        let mut guest = Guest::running(PAGES);
        // That the command has ended well says nothing of what it has done with the guest.
        let failure = leave(&mut guest, &to, &how.one_way()).failure();
        assert_eq!(failure.location, GuestLocation::OutcomeUnknown, "{failure}");
        guest.assert_kept();
        Destination::at(&uri(&format!("exec:cat {from}"))).join().guest();
    }
}

#[test]
fn a_paused_guest_arrives_paused_also_through_a_file() {
    let place = Place::new();
    let mut guest = Guest::idle(PAGES);
    let destination = Destination::at(&place.unix("socket"));
    leave(&mut guest, &destination.uri, &How::new()).outcome.unwrap();
    let mut guest = destination.join().paused();
    let file = uri(&format!("file:{}", place.path("guest")));
    leave(&mut guest, &file, &How::new()).outcome.unwrap();
    let mut guest = Destination::at(&file).join().paused();
    guest.start();
    let (guest, _) = travel(guest, &place.unix("on"), &How::new());
    guest.beat();
}

#[test]
fn a_paused_guest_whose_migration_fails_stays_paused() {
    let place = Place::new();
    let mut guest = Guest::idle(PAGES);
    let destination = Destination::new(&place.unix("socket"), Some(Refusal::Restore));
    let failure = leave(&mut guest, &destination.uri, &How::new()).failure();
    assert_eq!(failure.location, GuestLocation::PausedHere, "{failure}");
    assert_eq!((guest.calls.pauses, guest.calls.resumes, guest.is_running()), (1, 1, false));
    destination.join().nobody();
    guest.check().unwrap();
}

/// What is sent one way may run at the other end, or not: the source keeps the guest, and decides nothing.
#[test]
fn what_arrives_one_way_is_not_known_to_have_arrived() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    for (to, from) in [(ours.as_raw_fd(), theirs.as_raw_fd()), (writer.as_raw_fd(), reader.as_raw_fd())] {
        let mut guest = Guest::running(PAGES);
        let destination = Destination::at(&Uri::Fd(from));
        let failure = leave(&mut guest, &Uri::Fd(to), &How::new().one_way()).failure();
        assert_eq!(failure.location, GuestLocation::OutcomeUnknown, "{failure}");
        assert!(matches!(failure.error, MigrateError::OneWay), "{failure}");
        guest.assert_kept();
        destination.join().guest();
    }
}

#[test]
fn a_pipe_is_refused_unless_one_way_was_asked_for() {
    let (_reader, writer) = nix::unistd::pipe().unwrap();
    let mut guest = Guest::running(PAGES);
    let failure = leave(&mut guest, &Uri::Fd(writer.as_raw_fd()), &How::new()).failure();
    assert!(failure.to_string().contains("--one-way"), "{failure}");
    assert_nothing_happened(guest, &failure);
}

#[test]
fn a_file_behind_a_descriptor_holds_the_guest_when_it_is_complete() {
    let place = Place::new();
    let file = std::fs::File::create(place.path("guest")).unwrap();
    let mut guest = Guest::running(PAGES);
    leave(&mut guest, &Uri::Fd(file.as_raw_fd()), &How::new()).outcome.unwrap();
    guest.assert_gone();
    Destination::at(&uri(&format!("file:{}", place.path("guest")))).join().guest();
}

#[test]
fn without_the_dirty_log_pages_are_lost_and_the_check_notices() {
    let mut guest = Guest::running(PAGES).with(Trouble::Blind);
    let place = Place::new();
    let destination = Destination::at(&place.unix("socket"));
    let failure = leave(&mut guest, &destination.uri, &How::new()).failure();
    let MigrateError::Destination(words) = &failure.error else { panic!("{failure}") };
    assert!(words.contains("memory at 0x") && !words.contains(NO_ROOM), "{words}");
    destination.join().nobody();
    assert_nothing_happened(guest, &failure);
}

#[test]
fn the_figures_of_both_sides_add_up() {
    for channels in [1, 2, 5] {
        let place = Place::new();
        let mut guest = Guest::running(PAGES);
        let destination = Destination::at(&place.unix("socket"));
        let left = leave(&mut guest, &destination.uri, &How::new().channels(channels));
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
