//! Outcomes of the migrations of a destination, by id. This is the only place that decides between commit and giving
//! up.
//!
//! ```text
//! receiving ──commit──→ starting, then held ──started──→ started
//!     └──────give_up──→ given up
//! ```
//!
//! A source that loses its connection around the commit queries the outcome over another connection. A query before the
//! commit was read gives up the migration: a commit that arrives later has no effect.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::MigrateError;
use crate::stream::{CancelToken, Held, MigrationId, Started, StreamChannel, ToSource};
use crate::sys::with_causes::with_causes;

/// The outcomes of a destination's migrations. Clones share one table.
#[derive(Clone, Default)]
pub struct Outcomes(Arc<Mutex<OutcomeTable>>);

#[derive(Default)]
struct OutcomeTable {
    by_id: HashMap<MigrationId, KnownOutcome>,
    /// True if no further migration may start.
    closed: bool,
}

impl OutcomeTable {
    fn has_arrived(&self) -> bool {
        let arrived = |outcome: &_| {
            matches!(outcome, KnownOutcome::Starting(_) | KnownOutcome::Held(_) | KnownOutcome::Started(_))
        };
        self.by_id.values().any(arrived)
    }
}

/// Maximum number of stored outcomes. A source queries soon or never.
const MAX_OUTCOMES: usize = 1024;

enum KnownOutcome {
    /// Not committed.
    Receiving { channels: Vec<StreamChannel>, cancel: CancelToken },
    /// Given up for good, with the reason.
    GivenUp(String),
    /// Committed: this destination owns the guest and starts it until the token is cancelled.
    Starting(CancelToken),
    /// Committed: this destination owns the guest, which does not run.
    Held(Held),
    /// The guest was started here.
    Started(Started),
}

impl Outcomes {
    /// Returns the answer to an outcome query. A migration that is not committed is given up.
    pub fn answer(&self, id: MigrationId) -> ToSource {
        self.give_up(id, "the source lost the connection and queried the outcome before the commit arrived");
        match self.lock().by_id.get(&id) {
            Some(KnownOutcome::GivenUp(message)) => ToSource::Failed { message: message.clone() },
            Some(KnownOutcome::Starting(_)) => {
                ToSource::Held(Held { starting: true, message: "the guest is being started".into() })
            }
            Some(KnownOutcome::Held(held)) => ToSource::Held(held.clone()),
            Some(KnownOutcome::Started(started)) => ToSource::Started(*started),
            Some(KnownOutcome::Receiving { .. }) | None => ToSource::Unknown,
        }
    }

    /// Gives up the migration `id` for good if it is under way and not committed. Returns false otherwise.
    pub fn give_up(&self, id: MigrationId, why: &str) -> bool {
        self.lock().by_id.get_mut(&id).is_some_and(|outcome| give_up_uncommitted(outcome, why))
    }

    /// Records the failure of the migration `id`. Returns the reason to report: the migration may have been given up
    /// before, which has ended its stream.
    pub(super) fn record_failure(&self, id: MigrationId, error: MigrateError) -> MigrateError {
        match self.lock().by_id.get_mut(&id) {
            Some(KnownOutcome::GivenUp(why)) => MigrateError::GivenUp(why.clone()),
            Some(outcome @ KnownOutcome::Receiving { .. }) => {
                *outcome = KnownOutcome::GivenUp(with_causes(&error).to_string());
                error
            }
            _ => error,
        }
    }

    /// Gives up every uncommitted migration. Returns true if there was one.
    pub fn give_up_all(&self, why: &str) -> bool {
        self.lock().by_id.values_mut().fold(false, |any, outcome| give_up_uncommitted(outcome, why) | any)
    }

    /// Cancels the start of an arrived guest, which is kept paused. Returns true if one was being started.
    pub fn cancel_start(&self) -> bool {
        let known = self.lock();
        let cancelled = |outcome: &KnownOutcome| matches!(outcome, KnownOutcome::Starting(cancel) if cancel.cancel());
        known.by_id.values().fold(false, |any, outcome| cancelled(outcome) | any)
    }

    /// Gives up every uncommitted migration and refuses new ones. Returns false and changes nothing if a guest has
    /// arrived.
    pub fn close(&self, why: &str) -> bool {
        let mut known = self.lock();
        if known.has_arrived() {
            return false;
        }
        known.closed = true;
        for outcome in known.by_id.values_mut() {
            give_up_uncommitted(outcome, why);
        }
        true
    }

    /// Returns true if a guest has arrived, started or not.
    pub fn has_arrived(&self) -> bool {
        self.lock().has_arrived()
    }

    /// Records that the guest of the migration `id` runs.
    pub fn record_started(&self, id: MigrationId, started: Started) {
        self.lock().by_id.insert(id, KnownOutcome::Started(started));
    }

    /// Records the start of a migration.
    ///
    /// # Errors
    /// If the id was used before, or after [`close`](Self::close).
    pub(super) fn begin(
        &self,
        id: MigrationId,
        one_way: bool,
        channels: &[StreamChannel],
        cancel: &CancelToken,
    ) -> Result<(), MigrateError> {
        let mut known = self.lock();
        if known.closed {
            return Err(MigrateError::GivenUp("this destination is ending".into()));
        }
        if known.by_id.len() >= MAX_OUTCOMES {
            known.by_id.retain(|_, outcome| !matches!(outcome, KnownOutcome::GivenUp(_)));
        }
        let begun = KnownOutcome::Receiving { channels: channels.to_vec(), cancel: cancel.clone() };
        match known.by_id.entry(id) {
            // A file may be restored repeatedly.
            Entry::Occupied(_) if !one_way => Err(MigrateError::GivenUp("the migration id was used before".into())),
            Entry::Occupied(mut known) => {
                known.insert(begun);
                Ok(())
            }
            Entry::Vacant(new) => {
                new.insert(begun);
                Ok(())
            }
        }
    }

    /// Records the commit: this destination owns the guest, unless the migration was given up. Returns the token that
    /// [`cancel_start`](Outcomes::cancel_start) cancels.
    ///
    /// # Errors
    /// [`MigrateError::GivenUp`].
    pub(super) fn commit(&self, id: MigrationId) -> Result<CancelToken, MigrateError> {
        let starting = CancelToken::new()?;
        let mut known = self.lock();
        match known.by_id.get_mut(&id) {
            Some(outcome @ KnownOutcome::Receiving { .. }) => {
                *outcome = KnownOutcome::Starting(starting.clone());
                Ok(starting)
            }
            Some(KnownOutcome::GivenUp(why)) => Err(MigrateError::GivenUp(why.clone())),
            _ => Err(MigrateError::GivenUp("the migration is not under way".into())),
        }
    }

    /// Records that the guest could not be started.
    pub(super) fn record_held(&self, id: MigrationId, message: &str) -> Held {
        let held = Held { starting: false, message: message.into() };
        self.lock().by_id.insert(id, KnownOutcome::Held(held.clone()));
        held
    }

    fn lock(&self) -> MutexGuard<'_, OutcomeTable> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives up an uncommitted migration and ends its stream. Returns false for other migrations.
fn give_up_uncommitted(outcome: &mut KnownOutcome, why: &str) -> bool {
    let KnownOutcome::Receiving { channels, cancel } = outcome else { return false };
    // A source that has sent its commit can still receive the answer.
    if !cancel.cancel() {
        channels.iter().for_each(StreamChannel::shutdown_read);
    }
    *outcome = KnownOutcome::GivenUp(why.into());
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: MigrationId = MigrationId(1);
    const SECOND: MigrationId = MigrationId(2);
    const STARTED: Started = Started { observed_downtime_ns: Some(7), start_ns: 8 };

    fn begin(outcomes: &Outcomes, id: MigrationId, one_way: bool) -> Result<(), MigrateError> {
        outcomes.begin(id, one_way, &[], &CancelToken::new().unwrap())
    }

    /// Two migrations under way without streams.
    fn two_under_way() -> Outcomes {
        let outcomes = Outcomes::default();
        for id in [FIRST, SECOND] {
            begin(&outcomes, id, false).unwrap();
        }
        outcomes
    }

    #[test]
    fn a_commit_after_giving_up_says_why_it_has_no_effect() {
        let outcomes = two_under_way();
        assert!(outcomes.give_up(FIRST, "somebody said so"));
        assert!(!outcomes.give_up(FIRST, "somebody else said so"));
        let refusal = |id| outcomes.commit(id).map(drop).unwrap_err().to_string();
        assert!(refusal(FIRST).contains("somebody said so"), "{}", refusal(FIRST));
        assert!(refusal(MigrationId(3)).contains("not under way"), "{}", refusal(MigrationId(3)));
        assert!(!outcomes.has_arrived());
    }

    #[test]
    fn give_up_all_spares_committed_migrations() {
        let outcomes = two_under_way();
        assert!(outcomes.give_up_all("it ends"));
        assert!(!outcomes.give_up_all("it ends again"));
        for id in [FIRST, SECOND] {
            assert!(matches!(outcomes.answer(id), ToSource::Failed { message } if message == "it ends"));
        }

        let outcomes = two_under_way();
        outcomes.commit(FIRST).unwrap();
        assert!(outcomes.give_up_all("it ends"));
        assert!(matches!(outcomes.answer(FIRST), ToSource::Held(Held { starting: true, .. })));
        assert!(matches!(outcomes.answer(SECOND), ToSource::Failed { .. }));
    }

    #[test]
    fn close_is_refused_once_a_guest_has_arrived() {
        let outcomes = two_under_way();
        let starting = outcomes.commit(FIRST).unwrap();
        assert!(outcomes.has_arrived());
        assert!(!outcomes.close("it ends"));
        let other = outcomes.commit(SECOND).unwrap();
        assert!(!starting.is_cancelled() && !other.is_cancelled());
        assert!(outcomes.cancel_start());
        assert!(starting.is_cancelled() && other.is_cancelled());

        outcomes.record_held(FIRST, "no room");
        assert!(outcomes.has_arrived());
        assert!(matches!(outcomes.answer(FIRST), ToSource::Held(held) if !held.starting && held.message == "no room"));
        outcomes.record_started(FIRST, STARTED);
        assert!(outcomes.has_arrived());
        assert_eq!(outcomes.answer(FIRST), ToSource::Started(STARTED));
    }

    #[test]
    fn only_one_way_streams_may_reuse_a_migration_id() {
        let outcomes = two_under_way();
        assert!(begin(&outcomes, FIRST, false).is_err());
        outcomes.commit(FIRST).unwrap();
        assert!(begin(&outcomes, FIRST, false).is_err());
        assert!(outcomes.has_arrived());
        begin(&outcomes, FIRST, true).unwrap();
        assert!(!outcomes.has_arrived());
    }

    #[test]
    fn migrations_that_were_given_up_are_forgotten_when_there_are_many() {
        let outcomes = Outcomes::default();
        let kept = MigrationId(MAX_OUTCOMES as u128);
        for number in 0..=MAX_OUTCOMES as u128 {
            begin(&outcomes, MigrationId(number), false).unwrap();
            if MigrationId(number) != kept {
                outcomes.give_up(MigrationId(number), "it ends");
            }
        }
        assert_eq!(outcomes.answer(FIRST), ToSource::Unknown);
        assert!(matches!(outcomes.answer(kept), ToSource::Failed { .. }), "it is known until it is asked about");
    }

    #[test]
    fn close_gives_up_migrations_under_way() {
        let outcomes = two_under_way();
        assert!(outcomes.close("it ends"));
        assert!(outcomes.commit(FIRST).is_err() && outcomes.commit(SECOND).is_err());
        assert!(!outcomes.cancel_start());
        assert!(begin(&outcomes, MigrationId(3), false).is_err());
    }

    #[test]
    fn a_failure_after_giving_up_reports_the_reason_for_giving_up() {
        let outcomes = two_under_way();
        let failure = || MigrateError::Destination("no room".into());
        outcomes.give_up(FIRST, "somebody said so");
        assert!(outcomes.record_failure(FIRST, failure()).to_string().contains("somebody said so"));
        assert!(outcomes.record_failure(SECOND, failure()).to_string().contains("no room"));
        assert!(matches!(outcomes.answer(SECOND), ToSource::Failed { message } if message.contains("no room")));
    }

    #[test]
    fn an_unknown_migration_id_is_answered_with_unknown() {
        assert_eq!(Outcomes::default().answer(FIRST), ToSource::Unknown);
    }
}
