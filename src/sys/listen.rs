//! Listening on a UNIX socket path, with words for everything that can be in the way.
//!
//! A path is taken and given back under a lock of its directory (flock): between the look at what is there and the change
//! no other process that does the same can come.

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
/// Longest wait for other processes that take a path in the same directory.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// How often to look.
const LOCK_RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// Why a path can't be listened on, and what to do.
#[derive(Debug)]
pub(crate) struct ListenError {
    pub(crate) advice: String,
    pub(crate) source: Option<io::Error>,
}

/// The sockets of this process that are there.
static BOUND_SOCKETS: Mutex<Vec<Arc<BoundSocket>>> = Mutex::new(Vec::new());

/// A path that this process listens on. The socket there is removed with it.
#[derive(Debug)]
pub(crate) struct SocketPathGuard(Arc<BoundSocket>);

impl Drop for SocketPathGuard {
    fn drop(&mut self) {
        let mut all = bound_sockets();
        let ours = all.iter().position(|other| Arc::ptr_eq(other, &self.0)).map(|at| all.swap_remove(at));
        // No longer held: another one waits for no directory.
        drop(all);
        // One that is not among them was removed by `remove_all`.
        ours.iter().for_each(|bound_sockets| bound_sockets.remove());
    }
}

/// Removes all sockets of this process, for one that is about to end.
pub(crate) fn remove_all() {
    let all = std::mem::take(&mut *bound_sockets());
    all.iter().for_each(|bound_sockets| bound_sockets.remove());
}

fn bound_sockets() -> MutexGuard<'static, Vec<Arc<BoundSocket>>> {
    BOUND_SOCKETS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct BoundSocket {
    path: PathBuf,
    /// Device and inode of the socket there.
    inode: (u64, u64),
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

/// Listens at `path`. A socket that a dead process left there is replaced; a living one, or another file, is not.
pub(crate) fn listen(path: &Path) -> Result<(UnixListener, SocketPathGuard), ListenError> {
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(refused(&format!("the path is longer than {MAX_SOCKET_PATH} bytes, use a shorter one"), None));
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = File::open(parent).map_err(system_error)?;
    if !lock(&directory) {
        return Err(refused("its directory is locked by another process, end that", None));
    }
    let bound = bind(path).and_then(|listener| Ok((listener, inode(path).map_err(system_error)?)));
    let _ = directory.unlock();
    let (listener, inode) = bound?;
    let place = Arc::new(BoundSocket { path: path.into(), inode, directory });
    bound_sockets().push(place.clone());
    Ok((listener, SocketPathGuard(place)))
}

fn bind(path: &Path) -> Result<UnixListener, ListenError> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if !std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
                return Err(refused("a file that is no socket is there, move it or use another path", None));
            }
            if !matches!(socket::connect(path), Err(e) if e.kind() == io::ErrorKind::ConnectionRefused) {
                return Err(refused("another process listens there, end it or use another path", None));
            }
            tracing::info!("{}: replaces a socket that nobody listens on", path.display());
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
        io::ErrorKind::NotFound => "its directory doesn't exist, make it first".into(),
        io::ErrorKind::PermissionDenied => "no permission, use a directory you may read and write".into(),
        _ => error.to_string(),
    };
    ListenError { advice, source: Some(error) }
}

/// Takes the lock of a directory, which whoever has it gives back at once; false if that does not happen. A file system that
/// has no such locks is done without.
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

    /// What a process leaves that is killed.
    fn leave_stale(path: &Path) {
        let _ = std::fs::remove_file(path);
        drop(UnixListener::bind(path).unwrap());
    }

    #[test]
    fn of_those_that_start_at_once_exactly_one_listens_whatever_was_left_there() {
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
            let [(listener, _place)] = listening.as_slice() else { panic!("{} in round {round}", listening.len()) };
            let _client = UnixStream::connect(&path).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener.accept().unwrap();
        }
    }

    #[test]
    fn whoever_ends_leaves_its_successors_socket_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let first = listen(&path).unwrap();
        // As an operator makes room for a successor.
        std::fs::rename(&path, folder.path().join("old")).unwrap();
        let second = listen(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert!(!path.exists());
    }
}
