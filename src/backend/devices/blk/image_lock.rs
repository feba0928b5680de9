//! Lock of an image. It allows one writer at a time, and none before the I/O of a killed back-end has ended.
//!
//! A killed process can leave I/O in the kernel: with io_uring and O_DIRECT, I/O outlives its process. A late write
//! would undo writes of its successor, and a late read would overwrite guest memory that its driver has reused. A
//! flock(2) of the open file lives as long as such I/O. It is held while queues run, so a successor, or the destination
//! of a migration, waits for it. The lock is exclusive for readers too (rule I9.2).

use std::fs::{File, TryLockError};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

/// Maximum wait for the lock.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum wait of a probe. A stopped process may still have I/O in flight.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval between attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// The access that other processes have to a locked image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LockMode {
    /// No other process has access.
    Exclusive,
    /// Other processes with the same mode may read.
    Shared,
}

/// The lock of an open image.
#[derive(Debug)]
pub(super) struct ImageLock {
    file: File,
    mode: LockMode,
    /// Number of guards.
    guards: Mutex<usize>,
}

impl ImageLock {
    /// Creates the lock of an image. `file` is the open file through which I/O may outlive the process.
    pub(super) fn new(file: &File, sharing: LockMode) -> io::Result<ImageLock> {
        Ok(ImageLock { file: file.try_clone()?, mode: sharing, guards: Mutex::new(0) })
    }

    /// Waits for the lock.
    ///
    /// # Errors
    /// A timeout if another process holds it.
    pub(super) fn lock(self: &Arc<ImageLock>) -> io::Result<ImageLockGuard> {
        self.lock_within(LOCK_TIMEOUT)
    }

    /// Checks whether the lock is available, without keeping it.
    ///
    /// # Errors
    /// A timeout if another process holds it.
    pub(super) fn probe(self: &Arc<ImageLock>) -> io::Result<()> {
        self.lock_briefly().map(drop)
    }

    /// Locks the image with a short timeout.
    ///
    /// # Errors
    /// A timeout if another process holds it.
    pub(super) fn lock_briefly(self: &Arc<ImageLock>) -> io::Result<ImageLockGuard> {
        self.lock_within(PROBE_TIMEOUT)
    }

    fn lock_within(self: &Arc<ImageLock>, time: Duration) -> io::Result<ImageLockGuard> {
        let mut guards = self.guards.lock().unwrap_or_else(PoisonError::into_inner);
        if *guards == 0 {
            self.lock_file(Instant::now() + time)?;
        }
        *guards += 1;
        Ok(ImageLockGuard(self.clone()))
    }

    fn lock_file(&self, deadline: Instant) -> io::Result<()> {
        loop {
            let tried = match self.mode {
                LockMode::Exclusive => self.file.try_lock(),
                LockMode::Shared => self.file.try_lock_shared(),
            };
            match tried {
                Ok(()) => return Ok(()),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(RETRY_INTERVAL),
                Err(TryLockError::WouldBlock) => {
                    return Err(io::Error::new(
                        io::ErrorKind::ResourceBusy,
                        "another process has locked the image: stop it, or use --share-readers if both only read it, or \
                         --share-rw if both may write it",
                    ));
                }
                Err(TryLockError::Error(error)) => {
                    warn!("the image can't be locked ({error}): make sure that nothing else writes it");
                    return Ok(());
                }
            }
        }
    }
}

/// Holds the lock until dropped.
#[derive(Debug)]
pub(super) struct ImageLockGuard(Arc<ImageLock>);

impl Drop for ImageLockGuard {
    fn drop(&mut self) {
        let mut claims = self.0.guards.lock().unwrap_or_else(PoisonError::into_inner);
        *claims -= 1;
        if *claims == 0
            && let Err(error) = self.0.file.unlock()
        {
            warn!("the image can't be unlocked: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &std::path::Path, sharing: LockMode) -> Arc<ImageLock> {
        Arc::new(ImageLock::new(&File::open(path).unwrap(), sharing).unwrap())
    }

    fn is_free(path: &std::path::Path) -> bool {
        File::open(path).unwrap().try_lock().is_ok()
    }

    #[test]
    fn an_image_is_locked_until_the_last_guard_is_dropped() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let image = open(file.path(), LockMode::Exclusive);
        assert!(is_free(file.path()));
        let (first, second) = (image.lock().unwrap(), image.lock().unwrap());
        drop(first);
        assert!(!is_free(file.path()));
        drop(second);
        assert!(is_free(file.path()));
        drop(image.lock().unwrap());
    }

    #[test]
    fn a_probed_image_is_unlocked_afterwards() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let image = open(file.path(), LockMode::Exclusive);
        image.probe().unwrap();
        assert!(is_free(file.path()));
        let other = File::open(file.path()).unwrap();
        other.lock().unwrap();
        assert!(image.probe().unwrap_err().to_string().contains("another process has locked the image"));
        drop(other);
        let guard = image.lock().unwrap();
        image.probe().unwrap();
        assert!(!is_free(file.path()));
        drop(guard);
    }

    #[test]
    fn a_lock_waits_for_the_last_user_of_the_open_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let predecessor = File::open(file.path()).unwrap();
        predecessor.lock().unwrap();
        // Simulates I/O in the kernel, which keeps the open file after its process has closed it.
        let lingering = predecessor.try_clone().unwrap();
        drop(predecessor);
        let image = open(file.path(), LockMode::Exclusive);
        let waiting = std::thread::spawn(move || image.lock().map(|_| Instant::now()));
        std::thread::sleep(Duration::from_millis(50));
        let ended = Instant::now();
        drop(lingering);
        assert!(waiting.join().unwrap().unwrap() >= ended);
    }

    #[test]
    fn shared_locks_of_one_image_coexist() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, other) = (open(file.path(), LockMode::Shared), open(file.path(), LockMode::Shared));
        let _guards = (one.lock().unwrap(), other.lock().unwrap());
        assert!(!is_free(file.path()));
    }
}
