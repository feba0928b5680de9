//! Saves a stream to a file, a block device or an inherited descriptor of one.
//!
//! The header is written last, so that an incomplete save is never valid; until then a header marked as unfinished is
//! in its place. A `file:` that is not a device is a new unnamed file (O_TMPFILE), which gets its name when it is
//! complete and synced: a process that ends before that leaves nothing behind. Writing back starts while the guest
//! runs, so that completing a save only waits for the rest.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, OFlag, fcntl};
use nix::unistd::{Whence, fdatasync, linkat, lseek};

use super::{Uri, open_error};
use crate::stream::StreamError;
use crate::stream::frame::{ConnectionHeader, HEADER_BYTES, MAGIC, MigrationId};
use crate::stream::sys::rename;
use crate::sys::write_back::write_back;

/// Number of bytes after which new data is written back, and the previous part is waited for.
const WRITE_BACK_BYTES: u64 = 16 << 20;

/// Folder with this process's descriptors as paths.
const OWN_FD_FOLDER: &str = "/proc/self/fd";

/// Names of files with incomplete saves of this process.
static UNFINISHED_FILES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes the files of incomplete saves, for a process that is about to end. These saves then fail. Only a save to a
/// file system without unnamed files (O_TMPFILE) leaves a file behind at all.
pub fn remove_unfinished_saves() {
    // The lock is not held during file operations: other threads must not wait for a disk.
    let paths = std::mem::take(&mut *unfinished_files());
    for path in paths {
        // A file that was published in between does not exist under this name.
        let _ = std::fs::remove_file(path);
    }
}

fn unfinished_files() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED_FILES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes one entry of `path`.
fn unregister(path: &Path) {
    let mut paths = unfinished_files();
    if let Some(place) = paths.iter().position(|noted| noted == path) {
        paths.swap_remove(place);
    }
}

/// A save in progress.
pub(super) struct Save {
    header: ConnectionHeader,
    /// Offset of the header, bytes.
    start: u64,
    /// Bytes written, counted from `start`.
    written: u64,
    /// Bytes synced, counted from `start`.
    synced: u64,
    /// Bytes whose write-back has started, counted from `start`.
    started: u64,
    name: Option<PartialFile>,
}

impl Save {
    /// Starts a save at the current offset of `fd`, over any existing data.
    pub(super) fn begin(
        uri: &Uri,
        fd: &OwnedFd,
        name: Option<PartialFile>,
        header: ConnectionHeader,
    ) -> Result<Save, StreamError> {
        let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).map_err(io::Error::from)?);
        if flags.contains(OFlag::O_APPEND) {
            let advice = "it is opened for appending, and the header is written last: open it with > or <> instead";
            return Err(uri.error(advice, None));
        }
        let start = lseek(fd, 0, Whence::SeekCur).map_err(io::Error::from)?.cast_unsigned();
        let mut save = Save { header, start, written: 0, synced: 0, started: 0, name };
        save.write_header(fd, &header.encode_unfinished())?;
        save.written = HEADER_BYTES as u64;
        lseek(fd, (start + save.written).cast_signed(), Whence::SeekSet).map_err(io::Error::from)?;
        Ok(save)
    }

    /// Accounts for written bytes and starts writing them back.
    pub(super) fn account_written(&mut self, fd: &OwnedFd, count: usize) -> io::Result<()> {
        self.written += count as u64;
        if self.written - self.started >= WRITE_BACK_BYTES {
            write_back(fd.as_fd(), self.start + self.synced, self.started - self.synced, true)?;
            self.synced = self.started;
            write_back(fd.as_fd(), self.start + self.started, self.written - self.started, false)?;
            self.started = self.written;
        }
        Ok(())
    }

    /// Returns the number of bytes that may not be synced.
    pub(super) fn unsynced(&self) -> u64 {
        self.written - self.synced
    }

    /// Syncs everything written so far.
    pub(super) fn sync(&mut self, fd: &OwnedFd) -> io::Result<()> {
        fdatasync(fd)?;
        (self.synced, self.started) = (self.written, self.written);
        Ok(())
    }

    /// Completes the save and makes it durable. After an error it is marked as unfinished.
    pub(super) fn complete(mut self, fd: &OwnedFd) -> io::Result<()> {
        self.sync(fd)?;
        let header = self.header.encode();
        let whole = self.write_header(fd, &header).and_then(|()| Ok(fdatasync(fd)?));
        let whole = whole.and_then(|()| self.name.take().map_or(Ok(()), |name| name.publish(fd)));
        whole.inspect_err(|_| {
            // Best effort: the disk has already failed.
            let _ = self.write_header(fd, &self.header.encode_unfinished());
        })
    }

    fn write_header(&self, fd: &OwnedFd, header: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = header.get(done..).filter(|rest| !rest.is_empty()) {
            match nix::sys::uio::pwrite(fd, rest, (self.start + done as u64).cast_signed()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// A new file without a name or, if the file system does not support that, with a temporary name. It is removed unless
/// it is published.
pub(super) struct PartialFile {
    /// Temporary name. An unnamed file gets it just before it is renamed.
    from: PathBuf,
    named: bool,
    to: PathBuf,
    /// Device and inode of the file to be replaced, if there is one.
    replaces: Option<(u64, u64)>,
}

impl PartialFile {
    fn create(path: &Path, id: MigrationId) -> io::Result<(OwnedFd, PartialFile)> {
        let (from, replaces) = (partial_path(path, id), file_identity(path)?);
        // Reports an impossible name now and not at the end of the save.
        if path.as_os_str().as_bytes().ends_with(b"/") {
            return Err(io::Error::from_raw_os_error(libc::EISDIR));
        }
        file_identity(&from)?;
        let mut how = OpenOptions::new();
        let unnamed = how.write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(parent_folder(path));
        match unnamed {
            // The file can only be named through this folder.
            Ok(file) if Path::new(OWN_FD_FOLDER).is_dir() => {
                Ok((file.into(), PartialFile { from, named: false, to: path.into(), replaces }))
            }
            _ => PartialFile::create_named(path, id, replaces),
        }
    }

    fn create_named(path: &Path, id: MigrationId, replaces: Option<(u64, u64)>) -> io::Result<(OwnedFd, PartialFile)> {
        let from = partial_path(path, id);
        let mut how = OpenOptions::new();
        // Registered before it exists: the process may end at any time.
        unfinished_files().push(from.clone());
        let file = how.write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&from);
        let file = file.inspect_err(|_| unregister(&from))?;
        Ok((file.into(), PartialFile { from, named: true, to: path.into(), replaces }))
    }

    /// Renames the file to its final name, unless another save has taken that name since this one started.
    fn publish(mut self, fd: &OwnedFd) -> io::Result<()> {
        let taken = || StreamError::NameTaken(self.to.clone());
        if self.replaces != file_identity(&self.to)? {
            return Err(taken().into());
        }
        if !self.named {
            let open = format!("{OWN_FD_FOLDER}/{}", fd.as_raw_fd());
            unfinished_files().push(self.from.clone());
            let linked = linkat(AT_FDCWD, open.as_str(), AT_FDCWD, &self.from, AtFlags::AT_SYMLINK_FOLLOW);
            linked.inspect_err(|_| unregister(&self.from))?;
            self.named = true;
        }
        match rename(&self.from, &self.to, self.replaces.is_some()) {
            Ok(()) => {}
            Err(nix::Error::EEXIST) => return Err(taken().into()),
            // The file system does not support the flags.
            Err(nix::Error::EINVAL) => std::fs::rename(&self.from, &self.to)?,
            Err(error) => return Err(error.into()),
        }
        let synced = File::open(parent_folder(&self.to)).and_then(|folder| folder.sync_all());
        synced.inspect_err(|_| {
            // The guest resumes at its source: the save must not look valid.
            let _ = std::fs::remove_file(&self.to);
        })
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if self.named {
            // A published file has no temporary name.
            let _ = std::fs::remove_file(&self.from);
            unregister(&self.from);
        }
    }
}

/// Opens the target of `file:`. A new file is readable only by its owner, because it will hold the guest's memory.
pub(super) fn open(uri: &Uri, path: &Path, id: MigrationId) -> Result<(OwnedFd, Option<PartialFile>), StreamError> {
    match std::fs::metadata(path) {
        Ok(found) if found.file_type().is_fifo() => {
            return Err(uri.error("this is a pipe: open it in the shell and use fd:N", None));
        }
        Ok(found) if !found.is_file() => {
            // O_EXCL fails if the block device is in use, also by another save.
            let device = OpenOptions::new().write(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(path);
            let device = device.map_err(|error| match error.kind() {
                io::ErrorKind::ResourceBusy => uri.error("the device is in use: mounted, or saved to", error),
                _ => open_error(uri)(error),
            })?;
            return Ok((device.into(), None));
        }
        _ => {}
    }
    if is_foreign_file(path).map_err(open_error(uri))? {
        return Err(uri.error("what is there is no saved guest: remove it first, or save to another name", None));
    }
    let (file, partial) = PartialFile::create(path, id).map_err(open_error(uri))?;
    Ok((file, Some(partial)))
}

/// Returns true if the file was not written by a save, complete or not: a disk image, for example.
fn is_foreign_file(path: &Path) -> io::Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_file() && found.len() > 0 => {
            let mut magic = Vec::new();
            File::open(path)?.take(MAGIC.len() as u64).read_to_end(&mut magic)?;
            Ok(magic != MAGIC)
        }
        // A symbolic link is replaced, not followed.
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn partial_path(path: &Path, id: MigrationId) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    // Short, because names are limited in length. O_EXCL ensures that it is new.
    name.push(format!(".{:08x}.partial", id.0 as u32));
    name.into()
}

fn parent_folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Returns device and inode of the file with this name, or `None`.
fn file_identity(path: &Path) -> io::Result<Option<(u64, u64)>> {
    match std::fs::symlink_metadata(path) {
        Ok(found) => Ok(Some((found.dev(), found.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// All saves of this process are one list.
    fn alone() -> MutexGuard<'static, ()> {
        static ALONE: Mutex<()> = Mutex::new(());
        ALONE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates a partial file as on a file system without unnamed files.
    fn named(path: &Path) -> io::Result<(OwnedFd, PartialFile)> {
        PartialFile::create_named(path, MigrationId(0xabc), file_identity(path)?)
    }

    #[test]
    fn remove_unfinished_saves_removes_only_unpublished_files() {
        let _alone = alone();
        let folder = tempfile::tempdir().unwrap();
        let names = ["one", "two", "three"].map(|name| folder.path().join(name));
        let [one, two, three] = names.each_ref().map(|path| {
            let id = MigrationId(0xdef);
            PartialFile::create_named(path, id, None).unwrap()
        });
        one.1.publish(&one.0).unwrap();
        drop(two.1);
        remove_unfinished_saves();
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["one"]);
        assert!(three.1.publish(&three.0).is_err());
    }

    #[test]
    fn a_named_partial_file_is_created_exclusively_and_renamed_or_removed() {
        let _alone = alone();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("saved");
        let own = folder.path().join("saved.00000abc.partial");
        let (fd, partial) = named(&path).unwrap();
        assert_eq!(std::fs::metadata(&own).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(named(&path).err().map(|error| error.kind()), Some(io::ErrorKind::AlreadyExists));
        drop(partial);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);

        let victim = folder.path().join("victim");
        symlink(&victim, &own).unwrap();
        assert!(named(&path).is_err());
        assert!(!victim.exists());
        std::fs::remove_file(&own).unwrap();

        drop(fd);
        let (fd, partial) = named(&path).unwrap();
        File::from(fd.try_clone().unwrap()).write_all(b"whole").unwrap();
        partial.publish(&fd).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
