//! Saving a stream to a file, a block device or an inherited descriptor of one.
//!
//! The header is written last, so a save that was cancelled, killed or failed is never taken for a complete one; until
//! then a header marked as unfinished stands in its place. A `file:` that is not a device is a new file without a name,
//! which it gets when it is complete and on disk: a process that ends before leaves nothing behind. Writing back begins
//! while the guest runs, so that completing a save only waits for the rest.
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

/// Bytes after which a new piece is handed to the disk and the piece before it is waited for.
const WRITE_BACK_BYTES: u64 = 16 << 20;

/// This process's descriptors as paths.
const OWN_FD_FOLDER: &str = "/proc/self/fd";

/// Names of files that hold a part of a save, in this process.
static UNFINISHED_FILES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes the files of saves that are under way, for a process that is about to end without waiting for them. They fail, and
/// only a save to a file system without unnamed files (O_TMPFILE) leaves anything behind at all.
pub fn remove_unfinished_saves() {
    // No longer held than to take them out: whoever notes or forgets a name must not wait for a disk.
    let paths = std::mem::take(&mut *unfinished_files());
    for path in paths {
        // One that was published in between is not there any more.
        let _ = std::fs::remove_file(path);
    }
}

fn unfinished_files() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED_FILES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes one mention of `path` out of them.
fn unregister(path: &Path) {
    let mut paths = unfinished_files();
    if let Some(place) = paths.iter().position(|noted| noted == path) {
        paths.swap_remove(place);
    }
}

/// A save under way.
pub(super) struct Save {
    header: ConnectionHeader,
    /// Offset of the header.
    start: u64,
    /// Bytes written, counted from `start`.
    written: u64,
    /// The disk has these bytes, counted from `start`.
    synced: u64,
    /// The disk is writing the bytes up to here.
    started: u64,
    name: Option<PartialFile>,
}

impl Save {
    /// Begins a save at the current offset of `fd`, in place of what may be there.
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

    /// Accounts for bytes written and has the disk keep up.
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

    /// Bytes that the disk may not have yet.
    pub(super) fn unsynced(&self) -> u64 {
        self.written - self.synced
    }

    /// Waits until all that was written is on disk.
    pub(super) fn sync(&mut self, fd: &OwnedFd) -> io::Result<()> {
        fdatasync(fd)?;
        (self.synced, self.started) = (self.written, self.written);
        Ok(())
    }

    /// Makes the save complete and durable; one that fails is unfinished.
    pub(super) fn complete(mut self, fd: &OwnedFd) -> io::Result<()> {
        self.sync(fd)?;
        let header = self.header.encode();
        let whole = self.write_header(fd, &header).and_then(|()| Ok(fdatasync(fd)?));
        let whole = whole.and_then(|()| self.name.take().map_or(Ok(()), |name| name.publish(fd)));
        whole.inspect_err(|_| {
            // The disk fails: nothing better can be done.
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

/// A new file that has no name yet or, where the file system knows no such files, one of its own. It is removed unless it
/// is published.
pub(super) struct PartialFile {
    /// Its own name, which a file without one gets just before it is renamed.
    from: PathBuf,
    named: bool,
    to: PathBuf,
    /// Device and inode of the file that is to be replaced, if there is one.
    replaces: Option<(u64, u64)>,
}

impl PartialFile {
    fn create(path: &Path, id: MigrationId) -> io::Result<(OwnedFd, PartialFile)> {
        let (from, replaces) = (partial_path(path, id), file_identity(path)?);
        // What a name can't be is known now, not when everything was saved.
        if path.as_os_str().as_bytes().ends_with(b"/") {
            return Err(io::Error::from_raw_os_error(libc::EISDIR));
        }
        file_identity(&from)?;
        let mut how = OpenOptions::new();
        let unnamed = how.write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(parent_folder(path));
        match unnamed {
            // It can only be named through this folder.
            Ok(file) if Path::new(OWN_FD_FOLDER).is_dir() => {
                Ok((file.into(), PartialFile { from, named: false, to: path.into(), replaces }))
            }
            _ => PartialFile::create_named(path, id, replaces),
        }
    }

    fn create_named(path: &Path, id: MigrationId, replaces: Option<(u64, u64)>) -> io::Result<(OwnedFd, PartialFile)> {
        let from = partial_path(path, id);
        let mut how = OpenOptions::new();
        // Before it is there: the process may end at any moment.
        unfinished_files().push(from.clone());
        let file = how.write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&from);
        let file = file.inspect_err(|_| unregister(&from))?;
        Ok((file.into(), PartialFile { from, named: true, to: path.into(), replaces }))
    }

    /// Gives the file its name, unless another save has taken it since this one began.
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
            // A file system that knows no flags.
            Err(nix::Error::EINVAL) => std::fs::rename(&self.from, &self.to)?,
            Err(error) => return Err(error.into()),
        }
        let synced = File::open(parent_folder(&self.to)).and_then(|folder| folder.sync_all());
        synced.inspect_err(|_| {
            // The guest goes on at its source: its save must not seem to be good.
            let _ = std::fs::remove_file(&self.to);
        })
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if self.named {
            // Once it is published there is none.
            let _ = std::fs::remove_file(&self.from);
            unregister(&self.from);
        }
    }
}

/// Opens the target of `file:`. It will hold a guest's memory, so only its owner may read a new file.
pub(super) fn open(uri: &Uri, path: &Path, id: MigrationId) -> Result<(OwnedFd, Option<PartialFile>), StreamError> {
    match std::fs::metadata(path) {
        Ok(found) if found.file_type().is_fifo() => {
            return Err(uri.error("this is a pipe: open it in the shell and use fd:N", None));
        }
        Ok(found) if !found.is_file() => {
            // O_EXCL keeps others from a block device that is in use, also by another save.
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

/// True of a file whose contents no save has written, complete or not: an image of a disk, say.
fn is_foreign_file(path: &Path) -> io::Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_file() && found.len() > 0 => {
            let mut magic = Vec::new();
            File::open(path)?.take(MAGIC.len() as u64).read_to_end(&mut magic)?;
            Ok(magic != MAGIC)
        }
        // A link is replaced, not followed.
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn partial_path(path: &Path, id: MigrationId) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    // Short, since names are limited; that it is new is checked.
    name.push(format!(".{:08x}.partial", id.0 as u32));
    name.into()
}

fn parent_folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Device and inode of what has this name, or `None`.
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

    /// What a file system without unnamed files gets.
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
