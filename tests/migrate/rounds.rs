//! When a migration ends by itself, when it does not, and how fast it may go.

use std::time::{Duration, Instant};

use vhost_migrate::memory::LOG_PAGE;
use vhost_migrate::migrate::{ConvergencePolicy, MigrateError, MigrationEvent, STALL_ROUNDS};
use vhost_migrate::stream::RateLimiter;

use crate::guest::{Guest, PATIENCE, Trouble};
use crate::trip::{Destination, How, Place, assert_nothing_happened, leave};

const PAGES: u64 = 512;

/// A limit that a guest of this size takes about 50 ms to get through.
fn limited(policy: ConvergencePolicy) -> How {
    let mut how = How::new();
    how.parameters.policy = policy;
    how.options.limiter = RateLimiter::new(Some(40 << 20));
    how
}

#[test]
fn a_guest_that_writes_faster_than_the_link_is_given_up_running_and_says_so_before() {
    let place = Place::new();
    let mut guest = Guest::running(PAGES).with(Trouble::Relentless);
    let destination = Destination::at(&place.unix("socket"));
    let how = limited(ConvergencePolicy { downtime_limit: Duration::from_millis(1), max_rounds: 8 });
    let left = leave(&mut guest, &destination.uri, &how);

    let rounds = left.events.iter().filter(|event| matches!(event, MigrationEvent::Round(_))).count();
    assert_eq!(rounds, 8);
    let stalled = |event: &MigrationEvent| matches!(event, MigrationEvent::Stalled { .. });
    assert_eq!(left.events.iter().filter(|event| stalled(event)).count(), 1);
    let before = left.events.iter().position(stalled).unwrap();
    let before = left.events[..before].iter().filter(|event| matches!(event, MigrationEvent::Round(_))).count();
    assert_eq!(before, STALL_ROUNDS as usize);

    assert_eq!(guest.calls.pauses, 0, "the guest was never stopped");
    let failure = left.failure();
    assert!(matches!(failure.error, MigrateError::NoConvergence { rounds: 8, .. }), "{failure}");
    let told = destination.join().nobody();
    assert!(matches!(&told, MigrateError::Source(words) if words.contains("no convergence")), "{told}");
    assert_nothing_happened(guest, &failure);
}

#[test]
fn the_same_guest_arrives_when_its_downtime_may_be_long_enough() {
    let place = Place::new();
    let mut guest = Guest::running(PAGES).with(Trouble::Relentless);
    let destination = Destination::at(&place.unix("socket"));
    let left =
        leave(&mut guest, &destination.uri, &limited(ConvergencePolicy { downtime_limit: PATIENCE, max_rounds: 8 }));
    let (mut pages, mut milliseconds) = (0, 0.0);
    for event in &left.events {
        if let MigrationEvent::Round(round) = event {
            pages += round.pages_left;
            milliseconds += round.ms;
        }
    }
    let report = left.outcome.unwrap();
    assert_eq!(report.rounds, 2);
    let rate = (pages * LOG_PAGE) as f64 / (milliseconds / 1e3);
    assert!((report.dirty_rate_bytes_per_s / rate - 1.0).abs() < 1e-6, "{report:?}, by its rounds {rate} B/s");
    guest.assert_gone();
    destination.join().guest();
}

#[test]
fn a_migration_waits_for_a_device_that_is_away_and_takes_rounds_at_their_time() {
    // As in the documentation of `SourceVm::blocker`.
    const ROUND: Duration = Duration::from_secs(2);
    let place = Place::new();
    let mut guest = Guest::running(PAGES).with(Trouble::Away(ROUND * 3 / 2));
    let destination = Destination::at(&place.unix("socket"));
    let begun = Instant::now();
    let left = leave(&mut guest, &destination.uri, &How::new());
    let took = begun.elapsed();
    let count = |wanted: fn(&MigrationEvent) -> bool| left.events.iter().filter(|event| wanted(event)).count();
    assert_eq!(count(|event| matches!(event, MigrationEvent::Waiting { .. })), 1, "{:?}", left.events);
    // One for each time that was waited, and a few before and after. Without waiting it would be hundreds.
    let most = 20 + took.div_duration_f64(ROUND) as usize;
    assert!(
        took >= ROUND * 3 / 2 && count(|event| matches!(event, MigrationEvent::Round(_))) <= most,
        "{:?}",
        left.events
    );
    assert_eq!(guest.calls.pauses, 1, "it was stopped when all devices were there");
    left.outcome.unwrap();
    guest.assert_gone();
    destination.join().guest();
}

#[test]
fn a_bandwidth_limit_which_the_switchover_lifts_is_not_part_of_its_forecast() {
    let place = Place::new();
    let mut guest = Guest::running(PAGES).with(Trouble::Relentless);
    let destination = Destination::at(&place.unix("socket"));
    // All pages are dirty all the time: 2 s within the limit, some milliseconds without.
    let mut how = How::new();
    how.parameters.policy = ConvergencePolicy { downtime_limit: Duration::from_secs(1), max_rounds: 2 };
    how.options.limiter = RateLimiter::new(Some(1 << 20));
    let left = leave(&mut guest, &destination.uri, &how);
    left.outcome.unwrap();
    guest.assert_gone();
    destination.join().guest();
}

#[test]
fn no_more_goes_out_than_the_bandwidth_limit_allows() {
    const RATE: u64 = 8 << 20;
    for channels in [1, 3] {
        let place = Place::new();
        let mut guest = Guest::idle(4 * PAGES);
        let destination = Destination::at(&place.unix("socket"));
        let mut how = How::new().channels(channels);
        how.options.limiter = RateLimiter::new(Some(RATE));
        let left = leave(&mut guest, &destination.uri, &how);
        left.outcome.unwrap();
        let Some(MigrationEvent::Round(round)) =
            left.events.iter().find(|event| matches!(event, MigrationEvent::Round(_)))
        else {
            panic!("no round in {:?}", left.events);
        };
        // What is written at once, a tenth of a second's worth at the most, is waited for afterwards.
        let least = (round.wire_bytes - RATE / 10) as f64 / RATE as f64;
        assert!(round.wire_bytes > 5 << 20 && round.ms >= least * 1e3, "{round:?}, at least {least} s");
        destination.join().paused();
    }
}

#[test]
fn the_advice_to_a_migration_that_does_not_converge_follows_what_limits_it() {
    for (codec, limit, advice) in [
        ("none", None, "give it more bandwidth"),
        ("zstd:22", None, "use a faster codec"),
        ("none", Some(1 << 20), "raise the bandwidth limit"),
    ] {
        let place = Place::new();
        let mut guest = Guest::running(PAGES).with(Trouble::Relentless);
        let destination = Destination::at(&place.unix("socket"));
        let mut how = How::new().codec(codec);
        how.parameters.policy = ConvergencePolicy { downtime_limit: Duration::ZERO, max_rounds: 2 };
        how.options.limiter = RateLimiter::new(limit);
        let failure = leave(&mut guest, &destination.uri, &how).failure().to_string();
        assert!(failure.contains("no convergence") && failure.contains(advice), "{codec}, {limit:?}: {failure}");
        destination.join().nobody();
    }
}
