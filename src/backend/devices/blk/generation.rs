//! Generation and identity of an image. The restore of a saved guest compares generations (GET_DISK_GENERATION), a
//! migration compares identities (GET_DISK_IDENTITY).
//!
//! Both are random numbers in an extended attribute of the image: the identity names the disk, the generation its
//! contents. The generation is replaced, on stable storage, before the first change after rings have started. It is not
//! reported while they run, so one replacement per run is enough.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::image_lock::ImageLock;
use crate::abi::vhost_user::DiskGeneration;
use crate::sys::xattr;
use crate::sys::{lock, random::random};

/// The attribute: two numbers of 32 hexadecimal digits, separated by a colon.
const NAME: &CStr = c"user.vhost-migrate.generation";
const TEXT_BYTES: usize = 65;

/// The generation of an open image.
#[derive(Debug)]
pub(super) struct ImageGeneration {
    file: File,
    writable: bool,
    /// Number of running queues.
    queues: Mutex<usize>,
    /// True if the generation was replaced since the first of the running queues started.
    replaced: AtomicBool,
    /// Held while the generation is replaced.
    replace_lock: Mutex<()>,
}

impl ImageGeneration {
    /// Opens the generation of an image. Returns `None` if the image cannot have attributes.
    pub(super) fn new(file: &File, writable: bool) -> io::Result<Option<Arc<ImageGeneration>>> {
        if !file.metadata()?.is_file() || xattr::get::<TEXT_BYTES>(file, NAME).is_err_and(|error| !is_too_long(&error))
        {
            return Ok(None);
        }
        let (file, queues, replaced) = (file.try_clone()?, Mutex::new(0), AtomicBool::new(false));
        Ok(Some(Arc::new(ImageGeneration { file, writable, queues, replaced, replace_lock: Mutex::default() })))
    }

    /// Returns the current generation. Creates it if the image has none. The lock of `image` keeps other processes from
    /// changing it meanwhile.
    ///
    /// # Errors
    /// An error if rings run in any process, or the attribute cannot be read or written.
    pub(super) fn current(&self, image: Option<&Arc<ImageLock>>) -> io::Result<DiskGeneration> {
        let queues = lock(&self.queues);
        let image = image.ok_or_else(not_locked_error)?;
        if *queues > 0 {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another front-end runs rings"));
        }
        let _guard = image.lock_briefly()?;
        self.read_or_make()
    }

    /// Returns the identity, which is constant while rings run in any process. Creates it if the image has none and no
    /// other process uses the image.
    ///
    /// # Errors
    /// An error if the attribute cannot be read or written.
    pub(super) fn identity(&self, image: Option<&Arc<ImageLock>>) -> io::Result<u128> {
        if let Some(generation) = self.read()? {
            return Ok(generation.identity);
        }
        let _guard = image.ok_or_else(not_locked_error)?.lock_briefly()?;
        let _alone = lock(&self.replace_lock);
        self.read_or_make().map(|generation| generation.identity)
    }

    /// Records a queue that is about to run. The image must stay locked until the returned value is dropped.
    pub(super) fn queue_started(self: &Arc<ImageGeneration>) -> RunningQueue {
        *lock(&self.queues) += 1;
        RunningQueue(self.clone())
    }

    /// Returns the current generation. Creates it if the image has none.
    fn read_or_make(&self) -> io::Result<DiskGeneration> {
        match self.read()? {
            Some(generation) => Ok(generation),
            None if self.writable => self.write(random()?),
            None => Err(io::Error::other("the image has none, and is open for reading only")),
        }
    }

    fn read(&self) -> io::Result<Option<DiskGeneration>> {
        let text = match xattr::get::<TEXT_BYTES>(&self.file, NAME) {
            Ok(text) => text,
            // The attribute is in another format.
            Err(error) if is_too_long(&error) => None,
            Err(error) => return Err(error),
        };
        Ok(text.as_deref().and_then(parse))
    }

    fn write(&self, identity: u128) -> io::Result<DiskGeneration> {
        let generation = DiskGeneration { identity, generation: random()? };
        xattr::set(&self.file, NAME, format!("{identity:032x}:{:032x}", generation.generation).as_bytes())?;
        self.file.sync_all()?;
        Ok(generation)
    }

    /// Replaces the generation, unless it was replaced since the first of the running queues started.
    fn replace(&self) -> io::Result<()> {
        let _alone = lock(&self.replace_lock);
        if !self.replaced.load(Ordering::Relaxed) {
            let identity = self.read()?.map_or_else(random, |before| Ok(before.identity))?;
            self.write(identity)?;
            self.replaced.store(true, Ordering::Release);
        }
        Ok(())
    }
}

/// A running queue that uses the image, until dropped.
#[derive(Debug)]
pub(super) struct RunningQueue(Arc<ImageGeneration>);

impl RunningQueue {
    /// Replaces the generation if necessary. The caller must call this before every change of the image.
    ///
    /// # Errors
    /// An error if the generation cannot be replaced. The image must not be changed then.
    pub(super) fn before_change(&self) -> io::Result<()> {
        if self.0.replaced.load(Ordering::Relaxed) { Ok(()) } else { self.0.replace() }
    }
}

impl Drop for RunningQueue {
    fn drop(&mut self) {
        let mut queues = lock(&self.0.queues);
        *queues -= 1;
        if *queues == 0 {
            // From now on this process or another one may report the generation.
            self.0.replaced.store(false, Ordering::Relaxed);
        }
    }
}

/// Returns the error for an image without a lock.
fn not_locked_error() -> io::Error {
    io::Error::other("other processes may write the image at any time")
}

fn is_too_long(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ERANGE)
}

fn parse(text: &[u8]) -> Option<DiskGeneration> {
    let (identity, generation) = std::str::from_utf8(text).ok()?.split_once(':')?;
    let number = |digits: &str| u128::from_str_radix(digits, 16).ok();
    Some(DiskGeneration { identity: number(identity)?, generation: number(generation)? })
}

#[cfg(test)]
mod tests {
    use super::super::image_lock::LockMode;
    use super::*;

    /// Creates a file in `target`, because extended attributes may be unsupported in the system's temporary directory.
    fn image() -> tempfile::NamedTempFile {
        tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/target").unwrap()
    }

    fn open(file: &tempfile::NamedTempFile, writable: bool) -> (Arc<ImageGeneration>, Arc<ImageLock>) {
        let file = File::options().read(true).write(writable).open(file.path()).unwrap();
        let image = Arc::new(ImageLock::new(&file, LockMode::Exclusive).unwrap());
        (ImageGeneration::new(&file, writable).unwrap().expect("a file system with attributes"), image)
    }

    /// Rules G1.3, G1.6 and G1.7.
    #[test]
    fn the_generation_changes_with_the_first_write_after_ring_start_and_the_identity_never() {
        let file = image();
        let (generation, image) = open(&file, true);
        let report = |generation: &ImageGeneration| generation.current(Some(&image)).unwrap();
        let first = report(&generation);
        assert_eq!(report(&generation), first);
        assert_eq!(report(&open(&file, true).0), first, "another process");

        let queues = [generation.queue_started(), generation.queue_started()];
        assert!(generation.current(Some(&image)).is_err(), "it may change at any moment");
        drop(queues);
        assert_eq!(report(&generation), first, "nothing was changed");

        let queue = generation.queue_started();
        queue.before_change().unwrap();
        let while_it_runs = generation.read().unwrap();
        queue.before_change().unwrap();
        assert_eq!(generation.read().unwrap(), while_it_runs, "once is enough");
        drop(queue);
        let second = report(&generation);
        assert_eq!((second.identity, Some(second)), (first.identity, while_it_runs));
        assert_ne!(second.generation, first.generation);

        let queue = generation.queue_started();
        queue.before_change().unwrap();
        drop(queue);
        assert_ne!(report(&generation), second, "it was reported in between");
    }

    /// Rule G1.4.
    #[test]
    fn the_generation_is_refused_while_another_process_may_change_the_image() {
        let file = image();
        let (generation, own_lock) = open(&file, true);
        assert!(generation.current(None).is_err(), "shared with other writers");
        let (_, other_lock) = open(&file, true);
        let guard = other_lock.lock().unwrap();
        assert!(generation.current(Some(&own_lock)).is_err());
        drop(guard);
        assert!(generation.current(Some(&own_lock)).is_ok());
    }

    /// Rules G1.5 and G1.8.
    #[test]
    fn the_identity_is_available_while_rings_run_in_any_process() {
        let file = image();
        let (generation, own_lock) = open(&file, true);
        let queue = generation.queue_started();
        let guard = own_lock.lock().unwrap();
        let (other, other_lock) = open(&file, true);
        assert!(other.identity(Some(&other_lock)).is_err(), "another process may be about to give it one");
        let identity = generation.identity(Some(&own_lock)).unwrap();
        assert_eq!(other.identity(Some(&other_lock)).unwrap(), identity);
        assert_eq!(other.identity(None).unwrap(), identity, "shared with other writers");
        queue.before_change().unwrap();
        assert_eq!(other.identity(Some(&other_lock)).unwrap(), identity);
        drop((queue, guard));
        assert_eq!(generation.current(Some(&own_lock)).unwrap().identity, identity);

        let another = image();
        let (generation, image) = open(&another, true);
        assert_ne!(generation.identity(Some(&image)).unwrap(), identity, "nobody uses it: it gets one");
    }

    #[test]
    fn a_read_only_image_gets_no_generation() {
        let file = image();
        let (reader, image) = open(&file, false);
        assert!(reader.current(Some(&image)).is_err());
        assert!(reader.identity(Some(&image)).is_err());
        let (writer, _) = open(&file, true);
        let made = writer.current(Some(&image)).unwrap();
        assert_eq!(reader.current(Some(&image)).unwrap(), made);
    }

    #[test]
    fn an_invalid_generation_attribute_is_replaced() {
        let file = image();
        let (generation, image) = open(&file, true);
        for junk in ["", ":", "7", "x:y", &"9".repeat(TEXT_BYTES + 1)] {
            xattr::set(&generation.file, NAME, junk.as_bytes()).unwrap();
            let found = open(&file, true).0.current(Some(&image)).unwrap();
            assert_eq!(generation.read().unwrap(), Some(found));
        }
    }

    #[test]
    fn files_without_extended_attributes_have_no_generation() {
        let memfd = File::from(crate::memory::sealed_memfd("generation-test", 4096).unwrap());
        let without = ImageGeneration::new(&File::open("/dev/null").unwrap(), true).unwrap();
        assert!(without.is_none());
        // Linux 6.6 and later support user extended attributes on tmpfs.
        let _ = ImageGeneration::new(&memfd, true).unwrap();
    }
}
