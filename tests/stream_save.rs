//! Saves to a file, a block device or an inherited descriptor: a save is complete and durable, or it is refused, after
//! any failure and over any earlier contents.
#![allow(clippy::unwrap_used, clippy::panic, clippy::single_range_in_vec_init)]

#[path = "kit/page_cache.rs"]
mod page_cache;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use page_cache::unwritten;
use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory, Region, sealed_memfd};
use vhost_migrate::stream::{
    Codec, FrameKind, PageStats, StreamConnection, StreamError, StreamListener, StreamOptions, Uri, connect,
};
use vhost_migrate::unstable::stream::frame::{ConnectionHeader, FRAME_HEADER_BYTES, HEADER_BYTES, MAGIC};
use vhost_migrate::unstable::stream::pages::{IncomingMemory, PageDecoder, PageEncoder};
use vhost_migrate::unstable::stream::record::{Commit, RoundEnd, ToDestination};

const PAGES: u64 = 3072;
/// Upper bound of the size of a save, bytes.
const SAVE_BYTES: u64 = PAGES * (LOG_PAGE + 8) + 4096;

fn uri(text: impl AsRef<str>) -> Uri {
    text.as_ref().parse().unwrap()
}

fn file(path: &Path) -> Uri {
    uri(format!("file:{}", path.display()))
}

/// Returns a folder on a disk, unlike some systems' temporary folder.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn memory(pages: u64) -> Memory {
    let fd = sealed_memfd("guest", pages * LOG_PAGE).unwrap();
    Memory::new([Arc::new(Region::share(fd, GuestAddress(0), pages * LOG_PAGE, 0).unwrap())]).unwrap()
}

/// Returns memory in which every page contains `name`.
fn filled(pages: u64, name: u32) -> Memory {
    let memory = memory(pages);
    for page in 0..pages {
        let text = format!("page {page:8} of {name:8} ").repeat(160);
        memory.write(GuestAddress(page * LOG_PAGE), &text.as_bytes()[..LOG_PAGE as usize]).unwrap();
    }
    memory
}

fn bytes(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; memory.size() as usize];
    memory.read(GuestAddress(0), &mut bytes).unwrap();
    bytes
}

fn send(connection: &StreamConnection, memory: &Memory) -> Result<(), StreamError> {
    let mut writer = connection.writers().remove(0);
    let sent = PageEncoder::new(Codec::None)?.send(memory, [(0..memory.size() / LOG_PAGE).into()], &mut writer)?;
    ToDestination::RoundEnd(RoundEnd::new(0, true, &sent)).write(&mut writer)?;
    ToDestination::Commit(Commit { run: true }).write(&mut writer)?;
    Ok(())
}

fn save(to: &Uri, memory: &Memory) -> Result<(), StreamError> {
    let connection = connect(to, &StreamOptions::new()?)?;
    send(&connection, memory)?;
    connection.finish()
}

/// Restores a save, at most `most` frames.
fn restore(from: &Uri, most: usize) -> Result<Memory, StreamError> {
    let connection = StreamListener::bind(from)?.accept(&StreamOptions::new()?)?;
    let target = Arc::new(IncomingMemory::zeroed(memory(PAGES)));
    let mut decoder = PageDecoder::new(target.clone(), 0, 1)?;
    let mut reader = connection.readers().remove(0);
    let mut received = PageStats::default();
    for _ in 0..most {
        let header = reader.next_frame()?;
        if header.kind == FrameKind::Pages {
            received += decoder.receive(&header, &mut reader)?;
            continue;
        }
        match ToDestination::read(&header, &mut reader)? {
            ToDestination::RoundEnd(end) => end.check_received(&received)?,
            ToDestination::Commit(_) => break,
            other => panic!("{other:?}"),
        }
    }
    Ok(target.memory().clone())
}

/// A loop device, detached on drop.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn of(file: &Path) -> LoopDevice {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
        assert!(made.status.success(), "losetup needs root: {}", String::from_utf8_lossy(&made.stderr));
        LoopDevice(String::from_utf8(made.stdout).unwrap().trim().into())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

fn disk(folder: &Path) -> LoopDevice {
    let image = folder.join("disk");
    File::create(&image).unwrap().set_len(2 * SAVE_BYTES).unwrap();
    LoopDevice::of(&image)
}

/// Set in a process that is killed during a save: URI, number of the memory, bytes until it is killed.
const KILLED_SAVE_ENV: &str = "VHOST_MIGRATE_TEST_SAVE";

/// The process that is killed.
fn save_until_killed(orders: &str) {
    let [to, name, most] = orders.split(' ').collect::<Vec<_>>()[..] else { panic!("{orders}") };
    let (memory, most) = (filled(PAGES, name.parse().unwrap()), most.parse::<u64>().unwrap());
    let connection = connect(&uri(to), &StreamOptions::new().unwrap()).unwrap();
    let channel = connection.channels[0].clone();
    thread::spawn(move || {
        while channel.bytes_sent() < most {
            std::hint::spin_loop();
        }
        kill(Pid::this(), Signal::SIGKILL).unwrap();
    });
    send(&connection, &memory).unwrap();
    connection.finish().unwrap();
}

/// Saves to `device` in a process that is killed after about `most` bytes.
fn killed_save(test: &str, device: &Path, name: u32, most: u64) {
    let to = format!("file:{} {name} {most}", device.display());
    let child =
        Command::new(std::env::current_exe().unwrap()).arg("--exact").arg(test).env(KILLED_SAVE_ENV, to).output();
    let child = child.unwrap();
    let words = String::from_utf8_lossy(&child.stdout).into_owned() + &String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success() || child.status.code().is_none(), "{words}");
}

#[test]
fn a_save_onto_a_used_device_killed_at_any_byte_is_complete_or_refused() {
    if let Ok(orders) = std::env::var(KILLED_SAVE_ENV) {
        return save_until_killed(&orders);
    }
    const KILLS: u64 = 50;
    let folder = folder();
    let disk = disk(folder.path());
    let to = file(&disk.0);
    let name = "a_save_onto_a_used_device_killed_at_any_byte_is_complete_or_refused";
    let (mut whole, mut refused) = (0, 0);
    for number in 0..KILLS {
        // The frames of the earlier save are at the same offsets as the new ones.
        let old = filled(PAGES, 2 * number as u32);
        save(&to, &old).unwrap();
        assert!(bytes(&restore(&to, usize::MAX).unwrap()) == bytes(&old));
        // Not in the order of the bytes; the last offsets are behind the end.
        let most = (number * 17 % KILLS) * SAVE_BYTES / (KILLS - 3);
        killed_save(name, &disk.0, 2 * number as u32 + 1, most);
        match restore(&to, usize::MAX) {
            Ok(found) => {
                let found = bytes(&found);
                // A save killed before its start has changed nothing.
                let untouched = most == 0 && found == bytes(&old);
                assert!(
                    untouched || found == bytes(&filled(PAGES, 2 * number as u32 + 1)),
                    "a mix, after {most} bytes"
                );
                whole += 1;
            }
            Err(error) => {
                assert!(matches!(error, StreamError::Unfinished), "after {most} bytes: {error}");
                refused += 1;
            }
        }
    }
    assert!(refused >= KILLS / 2, "{refused} refused, {whole} whole: the kills came too late");
}

#[test]
fn a_killed_save_to_a_file_leaves_no_file() {
    if let Ok(orders) = std::env::var(KILLED_SAVE_ENV) {
        return save_until_killed(&orders);
    }
    let folder = folder();
    let path = folder.path().join("saved");
    let name = "a_killed_save_to_a_file_leaves_no_file";
    for there_before in [false, true] {
        if there_before {
            save(&file(&path), &filled(PAGES, 1)).unwrap();
        }
        for part in 0..4 {
            killed_save(name, &path, 2, part * SAVE_BYTES / 5);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), usize::from(there_before));
        }
    }
    assert!(bytes(&restore(&file(&path), usize::MAX).unwrap()) == bytes(&filled(PAGES, 1)));
}

/// The header alone does not protect a save: the frames after it may belong to another save.
#[test]
fn frames_of_an_earlier_save_are_refused_behind_a_new_header() {
    let folder = folder();
    let path = folder.path().join("saved");
    save(&file(&path), &filled(PAGES, 1)).unwrap();
    let one = fs::read(&path).unwrap();
    save(&file(&path), &filled(PAGES, 2)).unwrap();
    let mut mix = fs::read(&path).unwrap();
    assert_eq!(one.len(), mix.len());
    let border = (0..5).fold(HEADER_BYTES, |at, _| {
        let length: [u8; 4] = one[at + 4..at + 8].try_into().unwrap();
        at + FRAME_HEADER_BYTES + u32::from_le_bytes(length) as usize
    });
    mix[border..].copy_from_slice(&one[border..]);
    fs::write(&path, mix).unwrap();
    let refused = restore(&file(&path), usize::MAX);
    assert!(matches!(refused, Err(StreamError::Checksum { sequence: 5, .. })), "{:?}", refused.err());
}

#[test]
fn an_abandoned_save_is_unfinished_and_the_next_one_is_complete() {
    let folder = folder();
    let disk = disk(folder.path());
    let image = folder.path().join("disk");
    let opened = OpenOptions::new().write(true).open(&image).unwrap();
    for (to, from) in [(file(&disk.0), file(&disk.0)), (Uri::Fd(opened.as_raw_fd()), file(&image))] {
        let rewind = || nix::unistd::lseek(&opened, 0, nix::unistd::Whence::SeekSet).unwrap();
        rewind();
        save(&to, &filled(PAGES, 1)).unwrap();
        restore(&from, usize::MAX).unwrap();

        rewind();
        let options = StreamOptions::new().unwrap();
        let connection = connect(&to, &options).unwrap();
        send(&connection, &filled(PAGES, 2)).unwrap();
        options.cancel.cancel();
        assert!(matches!(connection.finish(), Err(StreamError::Cancelled)));
        drop(connection);
        let refused = restore(&from, usize::MAX).unwrap_err();
        assert!(matches!(refused, StreamError::Unfinished), "{refused}");
        assert!(refused.to_string().contains("Save the guest again"), "{refused}");

        rewind();
        save(&to, &filled(PAGES, 3)).unwrap();
        // An interrupted restore changes nothing.
        restore(&from, 4).unwrap();
        assert!(bytes(&restore(&from, usize::MAX).unwrap()) == bytes(&filled(PAGES, 3)), "{from}");
    }
}

#[test]
fn a_save_starts_at_the_descriptors_offset_and_refuses_append_mode() {
    let folder = folder();
    let path = folder.path().join("saved");
    let mut opened = File::create(&path).unwrap();
    opened.write_all(b"a head").unwrap();
    let connection = connect(&Uri::Fd(opened.as_raw_fd()), &StreamOptions::new().unwrap()).unwrap();
    send(&connection, &filled(16, 1)).unwrap();
    connection.finish().unwrap();
    let saved = fs::read(&path).unwrap();
    let (head, stream) = saved.split_at(6);
    assert_eq!(head, b"a head");
    ConnectionHeader::decode(stream.first_chunk().unwrap()).unwrap();

    let appending = OpenOptions::new().append(true).open(&path).unwrap();
    let refused = connect(&Uri::Fd(appending.as_raw_fd()), &StreamOptions::new().unwrap()).unwrap_err();
    assert!(refused.to_string().contains("opened for appending"), "{refused}");
}

#[test]
fn a_save_does_not_replace_a_file_that_is_no_save() {
    let folder = folder();
    let path = folder.path().join("disk.img");
    for contents in ["x", "an image of a disk"] {
        fs::write(&path, contents).unwrap();
        let refused = connect(&file(&path), &StreamOptions::new().unwrap()).unwrap_err();
        assert!(refused.to_string().contains("what is there is no saved guest"), "{refused}");
        assert_eq!(fs::read_to_string(&path).unwrap(), contents);
    }
    fs::write(&path, "").unwrap();
    save(&file(&path), &filled(64, 1)).unwrap();
    save(&file(&path), &filled(64, 2)).unwrap();
}

#[test]
fn a_save_creates_a_file_readable_only_by_its_owner() {
    let folder = folder();
    let (path, victim) = (folder.path().join("saved"), folder.path().join("victim"));
    fs::write(&victim, "precious").unwrap();
    fs::write(&path, MAGIC).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
    symlink(&victim, folder.path().join("saved.partial")).unwrap();
    let before = fs::read_dir(folder.path()).unwrap().count();
    save(&file(&path), &filled(64, 1)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), before);

    // A symbolic link is replaced, not followed.
    fs::remove_file(&path).unwrap();
    symlink(&victim, &path).unwrap();
    save(&file(&path), &filled(64, 2)).unwrap();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    assert!(fs::symlink_metadata(&path).unwrap().is_file());
}

#[test]
fn an_impossible_file_name_is_refused_before_the_save() {
    let folder = folder();
    // Also a name that is too long with the temporary suffix.
    for name in ["name/", &"n".repeat(256), &"n".repeat(245)] {
        let refused = connect(&file(&folder.path().join(name)), &StreamOptions::new().unwrap());
        assert!(matches!(refused, Err(StreamError::Open { .. })), "{name}: {:?}", refused.err());
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn the_first_of_two_saves_to_one_name_wins_and_the_other_fails() {
    for there_before in [false, true] {
        let folder = folder();
        let path = folder.path().join("saved");
        if there_before {
            save(&file(&path), &filled(64, 0)).unwrap();
        }
        let begin = |name| {
            let connection = connect(&file(&path), &StreamOptions::new().unwrap()).unwrap();
            send(&connection, &filled(PAGES, name)).unwrap();
            connection
        };
        let (one, two) = (begin(1), begin(2));
        two.finish().unwrap();
        let refused = one.finish().unwrap_err();
        assert!(matches!(refused, StreamError::NameTaken(_)), "{refused}");
        assert!(refused.to_string().contains("Save under another name"), "{refused}");
        assert!(bytes(&restore(&file(&path), usize::MAX).unwrap()) == bytes(&filled(PAGES, 2)));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

#[test]
fn a_second_save_onto_a_device_that_is_being_saved_to_is_refused() {
    let folder = folder();
    let disk = disk(folder.path());
    let first = connect(&file(&disk.0), &StreamOptions::new().unwrap()).unwrap();
    let refused = connect(&file(&disk.0), &StreamOptions::new().unwrap()).unwrap_err();
    assert!(refused.to_string().contains("the device is in use"), "{refused}");
    send(&first, &filled(PAGES, 1)).unwrap();
    first.finish().unwrap();
    restore(&file(&disk.0), usize::MAX).unwrap();
}

#[test]
fn a_save_is_written_back_continuously_and_synced_at_its_end() {
    /// Two write-back parts and the last write of each.
    const MOST: u64 = 34 << 20;
    let folder = folder();
    let memory = filled(6144, 1);
    let path = folder.path().join("inherited");
    let inherited = OpenOptions::new().create_new(true).write(true).read(true).open(&path).unwrap();
    let named = folder.path().join("named");
    for to in [Uri::Fd(inherited.as_raw_fd()), file(&named)] {
        let connection = connect(&to, &StreamOptions::new().unwrap()).unwrap();
        let channel = connection.channels[0].clone();
        let mut most = 0;
        for _ in 0..4 {
            send(&connection, &memory).unwrap();
            let dirty = unwritten(channel.fd()) * LOG_PAGE;
            assert!(dirty <= channel.unsynced_bytes() + 2 * LOG_PAGE, "{dirty} bytes of {}", channel.unsynced_bytes());
            most = most.max(dirty);
        }
        assert!(channel.bytes_sent() > 2 * MOST, "{}", channel.bytes_sent());
        assert!(most <= MOST, "{most} bytes are not on disk");
        connection.sync().unwrap();
        assert_eq!((unwritten(channel.fd()), channel.unsynced_bytes()), (0, 0));
        send(&connection, &memory).unwrap();
        connection.finish().unwrap();
        assert_eq!(unwritten(channel.fd()), 0, "the end of {to} is not on disk");
    }
}
