//! Convergence of migrations and the bandwidth limit.

use std::time::{Duration, Instant};

use vhost_migrate::memory::LOG_PAGE;
use vhost_migrate::migrate::{ConvergencePolicy, MigrateError, MigrationEvent, STALL_ROUNDS};
use vhost_migrate::stream::RateLimiter;
use vhost_migrate::unstable::with_causes;

use crate::guest::{Guest, GuestFault, PATIENCE};
use crate::harness::{Destination, MigrationSetup, assert_moved, assert_source_unharmed, migrate_out};

const PAGES: u64 = 512;

/// A bandwidth limit at which a round of this guest takes about 50 ms.
fn limited(policy: ConvergencePolicy) -> MigrationSetup {
    let mut setup = MigrationSetup::new();
    setup.parameters.policy = policy;
    setup.options.limiter = RateLimiter::new(Some(40 << 20));
    setup
}

#[test]
fn a_guest_that_dirties_faster_than_the_link_keeps_running_and_the_migration_fails() {
    let mut guest = Guest::running(PAGES).with_fault(GuestFault::AlwaysDirty);
    let (_folder, destination) = Destination::start();
    let setup = limited(ConvergencePolicy::new(Duration::from_millis(1), 8));
    let left = migrate_out(&mut guest, &destination.uri, &setup);

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
    let told = destination.join().expect_failure();
    assert!(matches!(&told, MigrateError::Source(words) if words.contains("no convergence")), "{told}");
    assert_source_unharmed(guest, &failure);
}

#[test]
fn a_longer_downtime_limit_lets_a_fast_writing_guest_migrate() {
    let mut guest = Guest::running(PAGES).with_fault(GuestFault::AlwaysDirty);
    let (_folder, destination) = Destination::start();
    let left = migrate_out(&mut guest, &destination.uri, &limited(ConvergencePolicy::new(PATIENCE, 8)));
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
    guest.assert_released();
    destination.join().guest();
}

#[test]
fn a_migration_waits_for_an_unavailable_device_with_periodic_rounds() {
    // As in the documentation of `SourceVm::blocker`.
    const ROUND: Duration = Duration::from_secs(2);
    let mut guest = Guest::running(PAGES).with_fault(GuestFault::Away(ROUND * 3 / 2));
    let (_folder, destination) = Destination::start();
    let begun = Instant::now();
    let left = migrate_out(&mut guest, &destination.uri, &MigrationSetup::new());
    let took = begun.elapsed();
    let count = |wanted: fn(&MigrationEvent) -> bool| left.events.iter().filter(|event| wanted(event)).count();
    assert_eq!(count(|event| matches!(event, MigrationEvent::Waiting { .. })), 1, "{:?}", left.events);
    // One round for each wait, and a few before and after. Without waits there would be hundreds.
    let most = 20 + took.div_duration_f64(ROUND) as usize;
    assert!(
        took >= ROUND * 3 / 2 && count(|event| matches!(event, MigrationEvent::Round(_))) <= most,
        "{:?}",
        left.events
    );
    assert_eq!(guest.calls.pauses, 1, "it was stopped when all devices were there");
    assert_moved(left, &guest, destination);
}

#[test]
fn the_expected_downtime_ignores_the_bandwidth_limit() {
    let mut guest = Guest::running(PAGES).with_fault(GuestFault::AlwaysDirty);
    let (_folder, destination) = Destination::start();
    // All pages are always dirty: 2 s with the limit, milliseconds without.
    let mut setup = MigrationSetup::new();
    setup.parameters.policy = ConvergencePolicy::new(Duration::from_secs(1), 2);
    setup.options.limiter = RateLimiter::new(Some(1 << 20));
    let left = migrate_out(&mut guest, &destination.uri, &setup);
    assert_moved(left, &guest, destination);
}

#[test]
fn the_bandwidth_limit_bounds_the_send_rate() {
    const RATE: u64 = 8 << 20;
    for channels in [1, 3] {
        let mut guest = Guest::idle(4 * PAGES);
        let (_folder, destination) = Destination::start();
        let mut setup = MigrationSetup::new().channels(channels);
        setup.options.limiter = RateLimiter::new(Some(RATE));
        let left = migrate_out(&mut guest, &destination.uri, &setup);
        left.outcome.unwrap();
        let Some(MigrationEvent::Round(round)) =
            left.events.iter().find(|event| matches!(event, MigrationEvent::Round(_)))
        else {
            panic!("no round in {:?}", left.events);
        };
        // A single write of up to a tenth of a second is waited for afterwards.
        let least = (round.wire_bytes - RATE / 10) as f64 / RATE as f64;
        assert!(round.wire_bytes > 5 << 20 && round.ms >= least * 1e3, "{round:?}, at least {least} s");
        destination.join().paused();
    }
}

#[test]
fn the_no_convergence_advice_names_the_limiting_factor() {
    for (codec, limit, advice) in [
        ("none", None, "give it more bandwidth"),
        ("zstd:22", None, "use a faster codec"),
        ("none", Some(1 << 20), "raise the bandwidth limit"),
    ] {
        let mut guest = Guest::running(PAGES).with_fault(GuestFault::AlwaysDirty);
        let (_folder, destination) = Destination::start();
        let mut setup = MigrationSetup::new().codec(codec);
        setup.parameters.policy = ConvergencePolicy::new(Duration::ZERO, 2);
        setup.options.limiter = RateLimiter::new(limit);
        let failure = migrate_out(&mut guest, &destination.uri, &setup).failure();
        let failure = with_causes(&failure).to_string();
        assert!(failure.contains("no convergence") && failure.contains(advice), "{codec}, {limit:?}: {failure}");
        destination.join().expect_failure();
    }
}
