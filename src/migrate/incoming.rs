//! Listening for guests, and for sources that ask what came of a migration, on a thread of its own: a question must be
//! answered while a guest is on its way or has just arrived.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};

use super::outcomes::Outcomes;
use crate::stream::{self, CancelToken, StreamConnection, StreamError, StreamListener, StreamOptions};

/// How long a migration that has connected may take to send its first frame, the memory layout.
const FIRST_FRAME_TIME: Duration = Duration::from_secs(10);

/// Most migrations that may be expected to send it. The oldest is dropped for another.
const MOST_EXPECTED: usize = 64;

/// Most migrations that have begun and wait for one under way to fail.
const MOST_WAITING: usize = 8;

/// How long nothing may come on any channel of a migration.
const IDLE_TIME: Duration = Duration::from_secs(60);

/// A migration that has begun.
pub struct IncomingMigration {
    /// Its channels.
    pub connection: StreamConnection,
    /// Ends it.
    pub cancel: CancelToken,
}

/// Takes connections at one URI until it is dropped.
pub struct MigrationListener {
    /// None when no migration is taken any more.
    migrations: Mutex<Option<Receiver<Result<IncomingMigration, StreamError>>>>,
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Of the wait for the next connection.
    cancel: CancelToken,
    /// When to listen no more.
    until: Option<Instant>,
}

impl MigrationListener {
    /// Takes connections of `listener`. Questions are answered by `outcomes`.
    ///
    /// # Errors
    /// If the system has no thread or file descriptor left.
    pub fn start(listener: StreamListener, outcomes: Outcomes) -> Result<MigrationListener, StreamError> {
        let (to, migrations) = bounded(MOST_WAITING);
        let shared = Arc::new(Mutex::new(Shared { cancel: CancelToken::new()?, until: None }));
        let its = shared.clone();
        let listen = move || {
            if let Err(error) = listen(&listener, &outcomes, &to, &its) {
                // Whoever waits for a migration reads it; after that it is of no interest.
                let _ = to.try_send(Err(error));
            }
        };
        let thread = Some(std::thread::Builder::new().name("incoming".into()).spawn(listen)?);
        Ok(MigrationListener { migrations: Mutex::new(Some(migrations)), shared, thread })
    }

    /// Waits for the next migration. Returns `None` if there will be none: after [`close`](Self::close), or if what was
    /// listened at carries only one.
    ///
    /// # Errors
    /// What [`StreamListener::next`] reports.
    pub fn next(&self) -> Result<Option<IncomingMigration>, StreamError> {
        let migrations = lock(&self.migrations).clone();
        migrations.and_then(|migrations| migrations.recv().ok()).transpose()
    }

    /// Listens no more.
    pub fn close(&self) {
        self.close_after(Duration::ZERO);
    }

    /// Listens no more after `time`. Until then questions are answered, and migrations refused, those that wait too.
    pub fn close_after(&self, time: Duration) {
        *lock(&self.migrations) = None;
        let mut shared = lock(&self.shared);
        shared.until = Some(Instant::now() + time);
        // The wait begins anew, for this long.
        shared.cancel.cancel();
    }
}

impl Drop for MigrationListener {
    fn drop(&mut self) {
        self.close();
        // It ends at once, and its socket with it.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen(
    listener: &StreamListener,
    outcomes: &Outcomes,
    to: &Sender<Result<IncomingMigration, StreamError>>,
    shared: &Mutex<Shared>,
) -> Result<(), StreamError> {
    let mut expected = Expected::default();
    loop {
        let cancel = CancelToken::new()?;
        let until = {
            let mut shared = lock(shared);
            shared.cancel = cancel.clone();
            shared.until
        };
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(());
        }
        let options =
            StreamOptions { deadline: left, timeout: Some(IDLE_TIME), cancel: cancel.clone(), ..StreamOptions::new()? };
        match listener.next(&options) {
            Ok(stream::IncomingConnection::OutcomeQuery(query)) => {
                let (id, answer) = (query.id, outcomes.answer(query.id));
                tracing::info!("the source of migration {id} asks what came of it: {answer:?}");
                if let Err(error) = query.answer(&answer) {
                    tracing::warn!("a source that asks about a migration went away: {error}");
                }
            }
            Ok(stream::IncomingConnection::Migration(connection)) if listener.uri().is_single() => {
                hand_on(to, IncomingMigration { connection, cancel });
                return Ok(());
            }
            Ok(stream::IncomingConnection::Migration(connection)) => {
                expected.admit(IncomingMigration { connection, cancel }, to.clone())?;
            }
            // It is closed, or to be closed later.
            Err(_) if lock(shared).until.is_some() => {}
            Err(error) => return Err(error),
        }
    }
}

fn hand_on(to: &Sender<Result<IncomingMigration, StreamError>>, arriving: IncomingMigration) {
    match to.try_send(Ok(arriving)) {
        Ok(()) => {}
        Err(TrySendError::Full(_)) => tracing::warn!("refused a migration: others are under way"),
        Err(TrySendError::Disconnected(_)) => tracing::warn!("refused a migration: none is waited for any more"),
    }
}

/// Migrations that have connected and not sent a frame: strangers, or sources that are about to. Each has a thread, so
/// that none holds up another.
#[derive(Default)]
struct Expected(VecDeque<(CancelToken, JoinHandle<()>)>);

impl Expected {
    /// Hands `arriving` on to `to` once it has begun.
    fn admit(
        &mut self,
        arriving: IncomingMigration,
        to: Sender<Result<IncomingMigration, StreamError>>,
    ) -> Result<(), StreamError> {
        self.0.retain(|(_, thread)| !thread.is_finished());
        if self.0.len() >= MOST_EXPECTED
            && let Some((oldest, thread)) = self.0.pop_front()
        {
            tracing::warn!("too many migrations that do not begin: dropping the oldest");
            oldest.cancel();
            // It ends at once.
            let _ = thread.join();
        }
        let cancel = arriving.cancel.clone();
        let wait = move || match arriving.connection.wait_for_frame(FIRST_FRAME_TIME) {
            Ok(()) => hand_on(&to, arriving),
            Err(error) => tracing::warn!("dropping a migration that has not begun: {error}"),
        };
        let thread = std::thread::Builder::new().name("expected migration".into()).spawn(wait)?;
        self.0.push_back((cancel, thread));
        Ok(())
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        for (cancel, thread) in self.0.drain(..) {
            // One that has begun is not called off by this: its thread has ended.
            if !thread.is_finished() {
                cancel.cancel();
            }
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
