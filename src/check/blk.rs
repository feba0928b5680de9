//! Block devices: reads, which make the device write guest memory without changing the disk; configuration space; and,
//! if allowed, writes to the last MiB.

use std::fs::File;
use std::io::{self, Write};

use std::path::PathBuf;
use std::thread;

use super::device::TestedDevice;
use super::device::blk::{BlkGeometry, read_config};
use super::harness::{HIGH, Harness, MAX_REQUESTS, SLOT_BYTES};
use super::outcome::{CheckAbort, Outcome};
use super::pages::noise;
use super::target::Target;
use crate::abi::vhost_user::ProtocolFeatures;
use crate::abi::virtio::{
    BlkRequestHeader, SECTOR_BYTES, VIRTIO_BLK_F_RO, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VirtioFeatures,
};
use crate::memory::Address;
use crate::ring::Buffer;
use crate::sys::with_causes::with_causes;
use nix::unistd::mkstemp;

/// Bytes at the end of the disk that `--write` may change.
const WRITABLE_TAIL: u64 = 1 << 20;
/// Minimum number of kills with writes in flight.
const MIN_KILLS: u64 = 3;
/// Maximum number of kills, if no write was in flight at any of them.
const MAX_KILLS: u64 = 10;

/// Splits the last MiB into parts: first sector and data buffer of each.
fn tail_parts(disk: BlkGeometry) -> Vec<(u64, Buffer)> {
    let sectors = (WRITABLE_TAIL / SECTOR_BYTES / MAX_REQUESTS).min(disk.sectors / MAX_REQUESTS);
    let sectors = sectors / disk.block_sectors * disk.block_sectors;
    let first = disk.sectors - sectors * MAX_REQUESTS;
    let len = (sectors * SECTOR_BYTES) as u32;
    (0..MAX_REQUESTS)
        .map(|slot| (first + slot * sectors, Buffer { gpa: HIGH.unchecked_add(slot * SLOT_BYTES), len }))
        .collect()
}

/// Adds one request for each part of the last MiB.
fn add_all(harness: &mut Harness, parts: &[(u64, Buffer)], request_type: u32) -> Result<(), CheckAbort> {
    for (slot, (sector, data)) in parts.iter().enumerate() {
        let head = BlkRequestHeader { request_type: request_type.into(), ioprio: 0.into(), sector: (*sector).into() };
        harness.add_request(slot, head, *data)?;
    }
    Ok(())
}

/// Reads all parts.
fn read_all(target: &Target, parts: &[(u64, Buffer)]) -> Result<Vec<Vec<u8>>, CheckAbort> {
    let mut harness = target.started(VirtioFeatures::empty())?;
    add_all(&mut harness, parts, VIRTIO_BLK_T_IN)?;
    harness.serve()?;
    let mut read = Vec::new();
    for (_, data) in parts {
        let mut bytes = vec![0; data.len as usize];
        harness.memory.read(data.gpa, &mut bytes)?;
        read.push(bytes);
    }
    Ok(read)
}

/// Fills the data buffers and adds the write requests.
fn prepare(harness: &mut Harness, parts: &[(u64, Buffer)], contents: &[Vec<u8>]) -> Result<(), CheckAbort> {
    for ((_, data), bytes) in parts.iter().zip(contents) {
        harness.memory.write(data.gpa, bytes)?;
    }
    add_all(harness, parts, VIRTIO_BLK_T_OUT)
}

pub(super) fn writes_before_stop(target: &mut Target) -> Result<Outcome, CheckAbort> {
    with_restore(target, |target, parts| overwrite(target, parts))
}

pub(super) fn writes_after_kill(target: &mut Target) -> Result<Outcome, CheckAbort> {
    if target.process.is_none() {
        return Ok(Outcome::not_tested("needs --restart and --write"));
    }
    with_restore(target, overwrite_after_death)
}

/// Runs `run`, which writes to the last MiB, and restores the old contents. Does not run it without `--write`.
fn with_restore(
    target: &mut Target,
    run: impl FnOnce(&mut Target, &[(u64, Buffer)]) -> Result<Outcome, CheckAbort>,
) -> Result<Outcome, CheckAbort> {
    let TestedDevice::Blk(disk) = target.device else { return Err(not_a_disk()) };
    if !target.options.write {
        return Ok(Outcome::not_tested("needs --write"));
    }
    let parts = tail_parts(disk);
    if target.offered.has(VIRTIO_BLK_F_RO) || parts.iter().any(|(_, data)| data.len == 0) {
        return Ok(Outcome::not_tested("the disk is read-only or too small"));
    }
    let before = read_all(target, &parts)?;
    let outcome = run(target, &parts).unwrap_or_else(Outcome::from);
    match target.restore_changes(|target| restore(target, &parts, &before)) {
        Ok(()) => Ok(outcome),
        Err(abort) => {
            let (first, Outcome(_, seen)) = (parts.first().map_or(0, |(sector, _)| *sector), outcome);
            let end = parts.last().map_or(0, |(sector, data)| sector + u64::from(data.len) / SECTOR_BYTES);
            let old_contents = match save_contents(&before) {
                Ok(path) => format!("their old contents are in {}", path.display()),
                Err(error) => format!("their old contents cannot be saved ({error})"),
            };
            let (last, abort) = (end - 1, with_causes(&abort));
            let unrestored =
                format!("sectors {first} to {last} of the disk were not restored ({abort}): {old_contents}");
            target.unrestored.push(unrestored.clone());
            Ok(Outcome::fail(format!("{seen}; {unrestored}")))
        }
    }
}

fn overwrite(target: &Target, parts: &[(u64, Buffer)]) -> Result<Outcome, CheckAbort> {
    let mut harness = target.started(VirtioFeatures::empty())?;
    let contents = contents(parts, 0);
    prepare(&mut harness, parts, &contents)?;
    harness.publish();
    let deadline = harness.deadline(harness.timeout);
    while !harness.pop()? && !deadline.is_over() {
        thread::yield_now();
    }
    let base = harness.stop()?;
    // Wait for requests that the back-end has not drained, so that none overwrites the restored contents.
    let deadline = harness.deadline(harness.timeout);
    while !harness.ring.is_same_base(base, harness.ring.current_base()) && !deadline.is_over() {
        harness.pop()?;
        thread::yield_now();
    }
    let base = parts.len() - usize::from(harness.outstanding());
    drop(harness);
    let found = read_all(target, parts)?;
    let wrong = found.iter().zip(&contents).take(base).filter(|(found, written)| found != written).count();
    Ok(match wrong {
        0 => Outcome::pass(format!("{base} writes, read back by the next front-end; the old contents were restored")),
        wrong => Outcome::fail(format!("{wrong} of {base} writes are not on the disk")),
    })
}

/// Returns data to write, different for each `round`.
fn contents(parts: &[(u64, Buffer)], round: u64) -> Vec<Vec<u8>> {
    (1..).zip(parts).map(|(slot, (_, data))| noise(round * 1000 + slot, data.len)).collect()
}

/// Kills the back-end with writes in flight, writes to the same sectors through its successor, and reads them back
/// (rule I9.1).
fn overwrite_after_death(target: &mut Target, parts: &[(u64, Buffer)]) -> Result<Outcome, CheckAbort> {
    let (mut open, mut round) = (0, 0);
    while round < MIN_KILLS || open == 0 && round < MAX_KILLS {
        round += 1;
        let mut harness = target.started(VirtioFeatures::empty())?;
        prepare(&mut harness, parts, &contents(parts, 2 * round))?;
        harness.publish();
        target.replace()?;
        harness.pop_all()?;
        open += u64::from(harness.outstanding());
        let mut harness = target.started(VirtioFeatures::empty())?;
        let written = contents(parts, 2 * round + 1);
        prepare(&mut harness, parts, &written)?;
        harness.serve()?;
        harness.wait_quiet();
        drop(harness);
        let found = read_all(target, parts)?;
        let wrong = found.iter().zip(&written).filter(|(found, written)| found != written).count();
        if wrong > 0 {
            return Ok(Outcome::fail(format!(
                "round {round}: {wrong} of {} writes completed by the successor are no longer on the disk",
                parts.len()
            )));
        }
    }
    Ok(no_late_write(round, open))
}

/// Returns the outcome if no late write was seen after `kills` kills with `open` writes open in total.
fn no_late_write(kills: u64, open: u64) -> Outcome {
    match open {
        0 => Outcome::not_tested(format!("killed {kills} times; all writes were complete each time")),
        open => Outcome::pass(format!("killed {kills} times with {open} writes in flight in total; none landed later")),
    }
}

fn restore(target: &Target, parts: &[(u64, Buffer)], before: &[Vec<u8>]) -> Result<(), CheckAbort> {
    let mut harness = target.started(VirtioFeatures::empty())?;
    prepare(&mut harness, parts, before)?;
    harness.serve()?;
    // Many back-ends serve one front-end at a time.
    drop(harness);
    match read_all(target, parts)? == before {
        true => Ok(()),
        false => Err(CheckAbort::Violation("the restored contents are not on the disk".into())),
    }
}

/// Saves contents that could not be restored to a file.
fn save_contents(contents: &[Vec<u8>]) -> io::Result<PathBuf> {
    let (fd, path) = mkstemp(&std::env::temp_dir().join("vhost-migrate-check-XXXXXX"))?;
    let mut file = File::from(fd);
    contents.iter().try_for_each(|part| file.write_all(part))?;
    Ok(path)
}

fn not_a_disk() -> CheckAbort {
    CheckAbort::NotOffered("a disk".into())
}

pub(super) fn config(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::CONFIG)?;
    let harness = target.harness(VirtioFeatures::empty())?;
    let (len, parts) = target.device.config();
    if len == 0 {
        return Err(CheckAbort::NotOffered("configuration space of this device".into()));
    }
    let whole = read_config(&harness.connection, 0, len)?;
    for &(offset, size) in parts {
        let part = read_config(&harness.connection, offset, size)?;
        if whole.get(offset as usize..(offset + size) as usize) != Some(&part) {
            return Ok(Outcome::fail(format!("{size} bytes at {offset} differ from the whole configuration")));
        }
    }
    Ok(Outcome::pass(format!("{len} bytes, also read in {} parts", parts.len())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::outcome::Verdict;

    #[test]
    fn no_open_writes_at_the_kills_is_not_tested() {
        assert_eq!(no_late_write(10, 0).0, Verdict::NotTested);
        assert_eq!(no_late_write(3, 1).0, Verdict::Pass);
    }
}
