//! Listens for migrations and outcome queries on a separate thread, so that queries are answered while a guest arrives.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};

use super::outcomes::Outcomes;
use crate::stream::{self, CancelToken, StreamConnection, StreamError, StreamListener, StreamOptions};
use crate::sys::with_causes::with_causes;

/// Time limit for a connected migration to send its first frame, the memory layout.
const FIRST_FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum number of migrations that have connected and not sent a frame. Beyond it the oldest is dropped.
const MAX_UNSTARTED: usize = 64;

/// Maximum number of migrations queued behind the one under way.
const MAX_QUEUED: usize = 8;

/// Time limit without received bytes on any channel of a migration.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Accepts migrations at one URI until it is dropped.
pub struct MigrationListener {
    /// `None` when no further migration is accepted.
    migrations: Mutex<Option<Receiver<Result<StreamConnection, StreamError>>>>,
    shared: Arc<Mutex<ListenState>>,
    thread: Option<JoinHandle<()>>,
}

struct ListenState {
    /// Cancels the wait for the next connection.
    cancel: CancelToken,
    /// Time to stop listening.
    until: Option<Instant>,
}

impl MigrationListener {
    /// Starts accepting connections of `listener`. `outcomes` answers queries. A migration ends if nothing arrives on
    /// any of its channels for 60 s. To cancel one, use its connection's token.
    ///
    /// # Errors
    /// If no thread or file descriptor is available.
    pub fn start(listener: StreamListener, outcomes: Outcomes) -> Result<MigrationListener, StreamError> {
        let (to, migrations) = bounded(MAX_QUEUED);
        let shared = Arc::new(Mutex::new(ListenState { cancel: CancelToken::new()?, until: None }));
        let thread_state = shared.clone();
        let listen = move || {
            if let Err(error) = listen(&listener, &outcomes, &to, &thread_state) {
                // Read by the next call of `next`, if there is one.
                let _ = to.try_send(Err(error));
            }
        };
        let thread = Some(std::thread::Builder::new().name("incoming".into()).spawn(listen)?);
        Ok(MigrationListener { migrations: Mutex::new(Some(migrations)), shared, thread })
    }

    /// Waits for the next migration that has sent its first frame. Returns `None` if there will be none: after
    /// [`close`](Self::close), or after the only migration of a single-channel transport.
    ///
    /// # Errors
    /// Errors of [`StreamListener::next`].
    pub fn next(&self) -> Result<Option<StreamConnection>, StreamError> {
        let migrations = lock(&self.migrations).clone();
        migrations.and_then(|migrations| migrations.recv().ok()).transpose()
    }

    /// Stops listening.
    pub fn close(&self) {
        self.close_after(Duration::ZERO);
    }

    /// Stops listening after `time`. Until then outcome queries are answered and migrations are refused, including
    /// queued ones.
    pub fn close_after(&self, time: Duration) {
        *lock(&self.migrations) = None;
        let mut shared = lock(&self.shared);
        shared.until = Some(Instant::now() + time);
        // Restarts the wait with this limit.
        shared.cancel.cancel();
    }
}

impl Drop for MigrationListener {
    fn drop(&mut self) {
        self.close();
        // The thread ends immediately and removes its socket.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen(
    listener: &StreamListener,
    outcomes: &Outcomes,
    to: &Sender<Result<StreamConnection, StreamError>>,
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
        let options = StreamOptions { deadline: left, timeout: Some(IDLE_TIMEOUT), cancel, ..StreamOptions::new()? };
        match listener.next(&options) {
            Ok(stream::IncomingConnection::OutcomeQuery(query)) => {
                let (id, answer) = (query.id, outcomes.answer(query.id));
                tracing::info!("the source of migration {id} asks what came of it: {answer:?}");
                if let Err(error) = query.reply(&answer) {
                    tracing::warn!("a source that asks about a migration went away: {}", with_causes(&error));
                }
            }
            Ok(stream::IncomingConnection::Migration(connection)) if listener.uri().is_single_channel() => {
                enqueue(to, connection);
                return Ok(());
            }
            Ok(stream::IncomingConnection::Migration(connection)) => {
                unstarted.admit(connection, to.clone())?;
            }
            // The listener was closed.
            Err(_) if lock(shared).until.is_some() => {}
            Err(error) => return Err(error),
        }
    }
}

fn enqueue(to: &Sender<Result<StreamConnection, StreamError>>, migration: StreamConnection) {
    match to.try_send(Ok(migration)) {
        Ok(()) => {}
        Err(TrySendError::Full(_)) => tracing::warn!("refused a migration: others are under way"),
        Err(TrySendError::Disconnected(_)) => tracing::warn!("refused a migration: none is waited for any more"),
    }
}

/// Migrations that have connected and not sent a frame. Each has a thread, so that none blocks another.
#[derive(Default)]
struct UnstartedMigrations(VecDeque<(CancelToken, JoinHandle<()>)>);

impl UnstartedMigrations {
    /// Queues `migration` on `to` when its first frame has arrived.
    fn admit(
        &mut self,
        migration: StreamConnection,
        to: Sender<Result<StreamConnection, StreamError>>,
    ) -> Result<(), StreamError> {
        self.0.retain(|(_, thread)| !thread.is_finished());
        if self.0.len() >= MAX_UNSTARTED
            && let Some((oldest, thread)) = self.0.pop_front()
        {
            tracing::warn!("too many migrations that do not begin: dropping the oldest");
            oldest.cancel();
            // The thread ends immediately.
            let _ = thread.join();
        }
        let cancel = migration.cancel_token().clone();
        let wait = move || match migration.wait_for_frame(FIRST_FRAME_TIMEOUT) {
            Ok(()) => enqueue(&to, migration),
            Err(error) => tracing::warn!("dropping a migration that has not begun: {}", with_causes(&error)),
        };
        let thread = std::thread::Builder::new().name("unstarted migration".into()).spawn(wait)?;
        self.0.push_back((cancel, thread));
        Ok(())
    }
}

impl Drop for UnstartedMigrations {
    fn drop(&mut self) {
        for (cancel, thread) in self.0.drain(..) {
            // A queued migration is not cancelled: its thread has ended.
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
