//! Listening on a UNIX socket path: stale sockets are replaced, and every refusal says what to do.
//!
//! A path is bound and removed under an advisory lock (flock) of its directory. Between the check of the path and the
//! change no other process that takes the same lock can bind or remove it.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::socket;

/// Longest path of a UNIX socket, bytes.
#[cfg_attr(not(feature = "command"), allow(unreachable_pub))]
pub const MAX_SOCKET_PATH: usize = 107;
/// Longest wait for the directory lock, which other processes hold only while they bind or remove a path.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval between attempts to take the directory lock.
const LOCK_RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// A refusal to listen on a path.
#[derive(Debug, thiserror::Error)]
#[error("{advice}")]
pub(crate) struct ListenError {
    /// The reason and the remedy, for a message that begins with the path.
    pub(crate) advice: String,
    pub(crate) source: Option<io::Error>,
}

/// All sockets that this process has bound and not yet removed.
static BOUND_SOCKETS: Mutex<Vec<Arc<BoundSocket>>> = Mutex::new(Vec::new());

/// A path that this process listens on. Dropping it removes the socket from the file system.
#[derive(Debug)]
pub(crate) struct SocketPathGuard(Arc<BoundSocket>);

impl Drop for SocketPathGuard {
    fn drop(&mut self) {
        let mut all = bound_sockets();
        let ours = all.iter().position(|other| Arc::ptr_eq(other, &self.0)).map(|at| all.swap_remove(at));
        // Released before the directory lock is waited for, so that sockets in other directories do not wait.
        drop(all);
        // A socket that is not in the list was removed by `remove_all`.
        ours.iter().for_each(|socket| socket.remove());
    }
}

/// Removes all sockets of this process from the file system. Call it before the process exits.
pub(crate) fn remove_all() {
    let all = std::mem::take(&mut *bound_sockets());
    all.iter().for_each(|socket| socket.remove());
}

fn bound_sockets() -> MutexGuard<'static, Vec<Arc<BoundSocket>>> {
    BOUND_SOCKETS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct BoundSocket {
    path: PathBuf,
    /// Device and inode number of the socket.
    inode: (u64, u64),
    /// Directory of the path, which is locked for changes.
    directory: File,
}

impl BoundSocket {
    /// Removes the socket, unless another process has replaced it since.
    fn remove(&self) {
        if lock(&self.directory) {
            if inode(&self.path).is_ok_and(|now| now == self.inode) {
                let _ = std::fs::remove_file(&self.path);
            }
            let _ = self.directory.unlock();
        }
    }
}

/// Listens at `path`. A socket that no process listens on is replaced.
///
/// # Errors
/// [`ListenError`] if the path is too long, if a process listens there, if the path is another kind of file, or if the
/// system refuses.
pub(crate) fn listen(path: &Path) -> Result<(UnixListener, SocketPathGuard), ListenError> {
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(refused(&format!("the path is longer than {MAX_SOCKET_PATH} bytes: use a shorter one"), None));
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = File::open(parent).map_err(system_error)?;
    if !lock(&directory) {
        return Err(refused("its directory is locked by another process: end that process", None));
    }
    let bound = bind(path).and_then(|listener| Ok((listener, inode(path).map_err(system_error)?)));
    let _ = directory.unlock();
    let (listener, inode) = bound?;
    let socket = Arc::new(BoundSocket { path: path.into(), inode, directory });
    bound_sockets().push(socket.clone());
    Ok((listener, SocketPathGuard(socket)))
}

fn bind(path: &Path) -> Result<UnixListener, ListenError> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if !std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
                return Err(refused("a file that is not a socket is there: move it or use another path", None));
            }
            if !matches!(socket::connect(path), Err(e) if e.kind() == io::ErrorKind::ConnectionRefused) {
                return Err(refused("another process listens there: end it or use another path", None));
            }
            tracing::info!("{}: replacing a socket that no process listens on", path.display());
            std::fs::remove_file(path).and_then(|()| UnixListener::bind(path)).map_err(system_error)
        }
        other => other.map_err(system_error),
    }
}

fn refused(advice: &str, source: Option<io::Error>) -> ListenError {
    ListenError { advice: advice.into(), source }
}

fn system_error(error: io::Error) -> ListenError {
    let advice = match error.kind() {
        io::ErrorKind::NotFound => "its directory does not exist: create it first".into(),
        io::ErrorKind::PermissionDenied => {
            "permission denied: use a directory that this user may read and write".into()
        }
        _ => "the system refuses".into(),
    };
    ListenError { advice, source: Some(error) }
}

/// Locks a directory. Returns false if another process holds the lock for longer than [`LOCK_TIMEOUT`].
///
/// Returns true without a lock on a file system that has no locks of this kind.
fn lock(directory: &File) -> bool {
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match directory.try_lock() {
            Ok(()) => return true,
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(LOCK_RETRY_INTERVAL),
            Err(TryLockError::WouldBlock) => return false,
            Err(TryLockError::Error(error)) => {
                tracing::debug!("flock of a directory: {error}");
                return true;
            }
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let found = std::fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::Barrier;

    use super::*;

    /// Leaves a socket without a listener, as a killed process does.
    fn leave_stale(path: &Path) {
        let _ = std::fs::remove_file(path);
        drop(UnixListener::bind(path).unwrap());
    }

    #[test]
    fn exactly_one_of_several_simultaneous_listeners_replaces_a_stale_socket() {
        const STARTS: usize = 4;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        for round in 0..200 {
            leave_stale(&path);
            let barrier = Barrier::new(STARTS);
            let start = || {
                barrier.wait();
                listen(&path)
            };
            let started: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..STARTS).map(|_| scope.spawn(start)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let listening: Vec<_> = started.into_iter().filter_map(Result::ok).collect();
            let [(listener, _guard)] = listening.as_slice() else { panic!("{} in round {round}", listening.len()) };
            let _client = UnixStream::connect(&path).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener.accept().unwrap();
        }
    }

    #[test]
    fn dropping_a_guard_does_not_remove_a_successors_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let first = listen(&path).unwrap();
        // As an operator does to start a successor beside a running process.
        std::fs::rename(&path, folder.path().join("old")).unwrap();
        let second = listen(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert!(!path.exists());
    }
}
