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
const FIRST_FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum number of migrations that have connected and not sent it. The oldest is dropped for another.
const MAX_UNSTARTED: usize = 64;

/// Most migrations that have begun and wait for one under way to fail.
const MAX_QUEUED: usize = 8;

/// How long nothing may come on any channel of a migration.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

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
    shared: Arc<Mutex<ListenState>>,
    thread: Option<JoinHandle<()>>,
}

struct ListenState {
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
        let (to, migrations) = bounded(MAX_QUEUED);
        let shared = Arc::new(Mutex::new(ListenState { cancel: CancelToken::new()?, until: None }));
        let thread_state = shared.clone();
        let listen = move || {
            if let Err(error) = listen(&listener, &outcomes, &to, &thread_state) {
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
    shared: &Mutex<ListenState>,
) -> Result<(), StreamError> {
    let mut unstarted = UnstartedMigrations::default();
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
        let options = StreamOptions {
            deadline: left,
            timeout: Some(IDLE_TIMEOUT),
            cancel: cancel.clone(),
            ..StreamOptions::new()?
        };
        match listener.next(&options) {
            Ok(stream::IncomingConnection::OutcomeQuery(query)) => {
                let (id, answer) = (query.id, outcomes.answer(query.id));
                tracing::info!("the source of migration {id} asks what came of it: {answer:?}");
                if let Err(error) = query.reply(&answer) {
                    tracing::warn!("a source that asks about a migration went away: {error}");
                }
            }
            Ok(stream::IncomingConnection::Migration(connection)) if listener.uri().is_single_channel() => {
                enqueue(to, IncomingMigration { connection, cancel });
                return Ok(());
            }
            Ok(stream::IncomingConnection::Migration(connection)) => {
                unstarted.admit(IncomingMigration { connection, cancel }, to.clone())?;
            }
            // It is closed, or to be closed later.
            Err(_) if lock(shared).until.is_some() => {}
            Err(error) => return Err(error),
        }
    }
}

fn enqueue(to: &Sender<Result<IncomingMigration, StreamError>>, migration: IncomingMigration) {
    match to.try_send(Ok(migration)) {
        Ok(()) => {}
        Err(TrySendError::Full(_)) => tracing::warn!("refused a migration: others are under way"),
        Err(TrySendError::Disconnected(_)) => tracing::warn!("refused a migration: none is waited for any more"),
    }
}

/// Migrations that have connected and not sent a frame: strangers, or sources that are about to. Each has a thread, so
/// that none holds up another.
#[derive(Default)]
struct UnstartedMigrations(VecDeque<(CancelToken, JoinHandle<()>)>);

impl UnstartedMigrations {
    /// Queues `migration` on `to` once it has begun.
    fn admit(
        &mut self,
        migration: IncomingMigration,
        to: Sender<Result<IncomingMigration, StreamError>>,
    ) -> Result<(), StreamError> {
        self.0.retain(|(_, thread)| !thread.is_finished());
        if self.0.len() >= MAX_UNSTARTED
            && let Some((oldest, thread)) = self.0.pop_front()
        {
            tracing::warn!("too many migrations that do not begin: dropping the oldest");
            oldest.cancel();
            // It ends at once.
            let _ = thread.join();
        }
        let cancel = migration.cancel.clone();
        let wait = move || match migration.connection.wait_for_frame(FIRST_FRAME_TIMEOUT) {
            Ok(()) => enqueue(&to, migration),
            Err(error) => tracing::warn!("dropping a migration that has not begun: {error}"),
        };
        let thread = std::thread::Builder::new().name("unstarted migration".into()).spawn(wait)?;
        self.0.push_back((cancel, thread));
        Ok(())
    }
}

impl Drop for UnstartedMigrations {
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
