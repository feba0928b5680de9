//! The program that runs in the real Linux guest, as all of its user space. It writes blocks of the disk and of memory,
//! each with contents derived from its number and version, reads them back and compares every byte. It prints
//! `ok DISK MEMORY` with increasing counts, or `BAD` and the error.
//! It is built separately with rustc, is statically linked, and belongs to no crate.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const O_DIRECT: i32 = 0o40000;
const BLOCK: usize = 4096;
const DISK_THREADS: u64 = 4;
const BLOCKS_PER_THREAD: u64 = 4096;
const LONGEST: u64 = 32;
const MEMORY_BLOCKS: u64 = 4096;

static DISK: AtomicU64 = AtomicU64::new(0);
static MEMORY: AtomicU64 = AtomicU64::new(0);

fn main() {
    let disk = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open("/dev/vda");
    let disk: &'static File = Box::leak(Box::new(disk.unwrap_or_else(|e| bad(&format!("/dev/vda: {e}")))));
    for thread in 0..DISK_THREADS {
        thread::spawn(move || disk_load(disk, thread * BLOCKS_PER_THREAD));
    }
    thread::spawn(memory_load);
    loop {
        thread::sleep(Duration::from_millis(100));
        println!("ok {} {}", DISK.load(Ordering::Relaxed), MEMORY.load(Ordering::Relaxed));
    }
}

/// Writes and reads the blocks from `first` on, which no other thread uses.
fn disk_load(disk: &File, first: u64) {
    let mut random = first + 1;
    let mut versions = vec![0; BLOCKS_PER_THREAD as usize];
    let mut space = vec![0; (LONGEST as usize + 1) * BLOCK];
    let aligned = space.as_ptr().align_offset(BLOCK);
    loop {
        let count = 1 + next(&mut random) % LONGEST;
        let start = next(&mut random) % (BLOCKS_PER_THREAD - count);
        let range = start as usize..(start + count) as usize;
        let buffer = &mut space[aligned..][..count as usize * BLOCK];
        let offset = (first + start) * BLOCK as u64;
        let number = |i: usize| first + start + i as u64;
        if next(&mut random) % 2 == 0 {
            let version = next(&mut random) | 1;
            for (i, block) in buffer.chunks_mut(BLOCK).enumerate() {
                fill(block, number(i), version);
            }
            disk.write_all_at(buffer, offset).unwrap_or_else(|e| bad(&format!("write at {offset}: {e}")));
            versions[range].fill(version);
        } else {
            disk.read_exact_at(buffer, offset).unwrap_or_else(|e| bad(&format!("read at {offset}: {e}")));
            for (i, (block, &version)) in buffer.chunks(BLOCK).zip(&versions[range]).enumerate() {
                check(block, number(i), version, "disk");
            }
        }
        DISK.fetch_add(1, Ordering::Relaxed);
    }
}

/// Reads and writes blocks of memory.
fn memory_load() {
    let mut random = 7;
    let mut versions = vec![0; MEMORY_BLOCKS as usize];
    let mut memory = vec![0; MEMORY_BLOCKS as usize * BLOCK];
    loop {
        let number = next(&mut random) % MEMORY_BLOCKS;
        let block = &mut memory[number as usize * BLOCK..][..BLOCK];
        check(block, number, versions[number as usize], "memory");
        versions[number as usize] = next(&mut random) | 1;
        fill(block, number, versions[number as usize]);
        if MEMORY.fetch_add(1, Ordering::Relaxed) % 64 == 0 {
            thread::sleep(Duration::from_millis(5)); // leaves a part of the only CPU to the disk load
        }
    }
}

/// Fills a block with the contents of a version. Version 0 is a block that was never written: zeroes.
fn fill(block: &mut [u8], number: u64, version: u64) {
    let mut state = number << 32 ^ version;
    for word in block.chunks_exact_mut(8) {
        let value = if version == 0 { 0 } else { next(&mut state) };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn check(found: &[u8], number: u64, version: u64, what: &str) {
    let mut expected = [0; BLOCK];
    fill(&mut expected, number, version);
    if found != expected {
        let at = found.iter().zip(&expected).position(|(a, b)| a != b).unwrap_or(0);
        bad(&format!(
            "{what} block {number} version {version:x}: byte {at} is {:x}, not {:x}",
            found[at], expected[at]
        ));
    }
}

fn bad(what: &str) -> ! {
    loop {
        println!("BAD {what}");
        thread::sleep(Duration::from_secs(1));
    }
}

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}
