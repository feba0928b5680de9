//! A guest without a CPU: memory in memfds, one ring in it, and the messages that hand both to a back-end.
//!
//! The lower region holds the ring, the heads of requests and their status bytes; the upper one, above 4 GiB, holds data.
//! A request has a slot: its place for each of these. No page is written by both sides, but those of rings.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use twox_hash::XxHash3_64;
use zerocopy::IntoBytes;

use super::blk::{Disk, NO_STATUS};
use super::link::{Link, readable};
use super::{Fault, Offer, Options};
use crate::abi::bit;
use crate::abi::vhost_user::{
    Header, LogDescription, MemoryHeader, MemoryRegion, Request as Code, VHOST_F_LOG_ALL,
    VHOST_USER_F_PROTOCOL_FEATURES, VHOST_VRING_F_LOG, VringAddr, VringState, protocol_feature,
};
use crate::abi::virtio::{
    BlkRequestHeader, VIRTIO_BLK_T_IN, VIRTIO_F_VERSION_1, avail_ring_bytes, desc_table_bytes, used_ring_bytes,
};
use crate::dirty::{Log, PageSet};
use crate::memory::{LOG_PAGE, Memory, Region, sealed_memfd};
use crate::ring::{Buffer, SplitDriver, SplitDriverState, SplitLayout};

/// Protocol features that are agreed on where they are offered.
pub(super) const PROTOCOL: u64 = bit(protocol_feature::MQ)
    | bit(protocol_feature::LOG_SHMFD)
    | bit(protocol_feature::REPLY_ACK)
    | bit(protocol_feature::CONFIG)
    | bit(protocol_feature::INFLIGHT_SHMFD)
    | bit(protocol_feature::RESET_DEVICE)
    | bit(protocol_feature::CONFIGURE_MEM_SLOTS)
    | bit(protocol_feature::STATUS);

/// Most requests at a time; they fill the smallest ring with their three descriptors each.
pub(super) const SLOTS: u64 = 20;
/// Room for the data of a request, bytes.
pub(super) const SLOT: u64 = 512 << 10;
/// The lower region.
const LOW_BYTES: u64 = 8 << 20;
/// The upper region.
pub(super) const HIGH: u64 = 1 << 32;
const HIGH_BYTES: u64 = SLOTS * SLOT;
const DESC: u64 = 0x10_0000;
const AVAIL: u64 = 0x14_0000;
const USED: u64 = 0x18_0000;
/// Pages of the lower region that nobody writes: where a used ring can be logged that is not there.
pub(super) const NOWHERE: u64 = 0x30_0000;
const STATUSES: u64 = 0x40_0000;
const HEADS: u64 = 0x60_0000;
/// Room for the head of a request, bytes.
const HEAD: u64 = 16;

pub(super) type Pages = BTreeSet<u64>;

/// One connection with memory and a ring.
pub(super) struct Rig {
    pub(super) link: Link,
    pub(super) offer: Offer,
    disk: Disk,
    pub(super) timeout: Duration,
    pub(super) settle: Duration,
    pub(super) memory: Memory,
    pub(super) layout: SplitLayout,
    pub(super) driver: SplitDriver,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    /// Acknowledged features, LOG_ALL left out.
    pub(super) features: u64,
    /// Requests made so far; also what their data buffers are filled with.
    made: u64,
    /// By slot: the head in flight.
    heads: Vec<Option<u16>>,
    /// Pages of data and status that the device may have written.
    pub(super) lent: Pages,
}

/// How much a batch of reads asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    /// Some sectors, at any place in a page.
    Mixed,
    /// As much as there is room for, to be long under way.
    Large,
}

impl Rig {
    /// Greets, acknowledges VERSION_1 and `features` as far as they are offered, and hands memory over.
    pub(super) fn new(link: Link, offer: Offer, disk: Disk, options: &Options, features: u64) -> Result<Rig, Fault> {
        let share = |gpa, bytes| {
            let fd = sealed_memfd("check", bytes)?;
            Ok::<_, Fault>(Arc::new(Region::share(fd, gpa, bytes, 0)?))
        };
        let memory = Memory::new([share(0, LOW_BYTES)?, share(HIGH, HIGH_BYTES)?])?;
        let always = bit(VIRTIO_F_VERSION_1) | bit(VHOST_USER_F_PROTOCOL_FEATURES);
        let features = offer.features & (always | features);
        let layout = SplitLayout { size: options.queue_size, desc: DESC, avail: AVAIL, used: USED };
        let driver = SplitDriver::new(&memory, layout, features)?;
        let eventfd = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let rig = Rig {
            link,
            offer,
            disk,
            timeout: options.timeout,
            settle: options.settle,
            memory,
            layout,
            driver,
            kick: eventfd()?,
            call: eventfd()?,
            features,
            made: 0,
            heads: vec![None; SLOTS as usize],
            lent: Pages::new(),
        };
        rig.greet()?;
        Ok(rig)
    }

    /// Owner, protocol features, features and memory, on a new connection.
    fn greet(&self) -> Result<(), Fault> {
        self.link.send(Code::SET_OWNER, Header::FLAG_VERSION, &[], &[])?;
        if self.offer.has(VHOST_USER_F_PROTOCOL_FEATURES) {
            let agreed = self.offer.protocol & PROTOCOL;
            self.link.send(Code::SET_PROTOCOL_FEATURES, Header::FLAG_VERSION, agreed.as_bytes(), &[])?;
        }
        self.done(Code::SET_FEATURES, self.features.as_bytes(), &[])?;
        self.send_memory()
    }

    /// Goes on with the same guest on another connection; requests in flight stay so.
    pub(super) fn reconnect(&mut self, link: Link) -> Result<(), Fault> {
        self.link = link;
        self.greet()
    }

    /// A request without a reply of its own, until it is done (rule F4).
    pub(super) fn done(&self, code: Code, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Fault> {
        if !self.offer.speaks(protocol_feature::REPLY_ACK) {
            self.link.send(code, Header::FLAG_VERSION, payload, fds)?;
            return self.link.barrier().map(|_| ());
        }
        match self.link.acknowledged(code, payload, fds)? {
            0 => Ok(()),
            answer => Err(Fault::Refused { code, answer }),
        }
    }

    /// The payload of SET_MEM_TABLE.
    pub(super) fn table(&self) -> Vec<u8> {
        let regions = self.memory.regions();
        let mut payload = MemoryHeader { nregions: regions.len() as u32, padding: 0 }.as_bytes().to_vec();
        regions.iter().for_each(|region| payload.extend(describe(region).as_bytes()));
        payload
    }

    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.memory.regions().iter().filter_map(|region| Some(region.shared()?.0)).collect()
    }

    pub(super) fn send_memory(&self) -> Result<(), Fault> {
        self.done(Code::SET_MEM_TABLE, &self.table(), &self.fds())
    }

    /// The front-end's address of a guest-physical one.
    fn user(&self, gpa: u64) -> u64 {
        let region = self.memory.regions().iter().rev().find(|region| region.gpa() <= gpa);
        region.map_or(0, |region| region.user_addr().wrapping_add(gpa - region.gpa()))
    }

    /// The payload of SET_VRING_ADDR; `log_at` is `log_guest_addr`, with which F_LOG is set.
    pub(super) fn addr(&self, log_at: Option<u64>) -> VringAddr {
        VringAddr {
            index: 0,
            flags: u32::from(log_at.is_some()) << VHOST_VRING_F_LOG,
            desc_user_addr: self.user(self.layout.desc),
            used_user_addr: self.user(self.layout.used),
            avail_user_addr: self.user(self.layout.avail),
            log_guest_addr: log_at.unwrap_or(self.layout.used),
        }
    }

    /// CALL, NUM, BASE, ADDR and KICK (rule R6): the ring is started, and disabled where it can be.
    pub(super) fn start_disabled(&self, base: u16, log_at: Option<u64>) -> Result<(), Fault> {
        let index = 0u64.as_bytes();
        let size = VringState { index: 0, num: self.layout.size.into() };
        self.done(Code::SET_VRING_CALL, index, &[self.call.as_fd()])?;
        self.done(Code::SET_VRING_NUM, size.as_bytes(), &[])?;
        self.done(Code::SET_VRING_BASE, VringState { index: 0, num: base.into() }.as_bytes(), &[])?;
        self.done(Code::SET_VRING_ADDR, self.addr(log_at).as_bytes(), &[])?;
        self.done(Code::SET_VRING_KICK, index, &[self.kick.as_fd()])
    }

    pub(super) fn enable(&self, yes: bool) -> Result<(), Fault> {
        if self.features & bit(VHOST_USER_F_PROTOCOL_FEATURES) == 0 {
            return Ok(());
        }
        self.done(Code::SET_VRING_ENABLE, VringState { index: 0, num: yes.into() }.as_bytes(), &[])
    }

    /// Starts and enables the ring where the driver is, and kicks it, as some need it.
    pub(super) fn start(&self) -> Result<(), Fault> {
        let state = self.driver.state();
        self.start_disabled(state.used.wrapping_add(state.chains.len() as u16), None)?;
        self.enable(true)?;
        self.wake();
        Ok(())
    }

    /// Starts the driver over with indexes at `at`; nothing may be in flight.
    pub(super) fn move_to(&mut self, at: u16) -> Result<(), Fault> {
        let state =
            SplitDriverState { avail: at, published: at, used: at, chains: Vec::new(), first_free: 0, in_order: None };
        self.driver = SplitDriver::restore(&self.memory, self.layout, self.features, &state)?;
        for area in [self.layout.avail, self.layout.used] {
            self.memory.write(area + 2, &at.to_le_bytes())?;
        }
        Ok(())
    }

    /// Signals the kick fd, wanted or not.
    pub(super) fn wake(&self) {
        // One that is full is signalled already.
        let _ = self.kick.write(1);
    }

    /// Makes `count` reads of which none is visible yet. Every data buffer is filled anew, so that a device can't write
    /// what is there already.
    pub(super) fn add(&mut self, count: u64, size: Size) -> Result<(), Fault> {
        for _ in 0..count {
            let Some(slot) = self.heads.iter().position(Option::is_none) else {
                return Err(Fault::System(std::io::Error::other("no slot is free")));
            };
            let number = slot as u64;
            let offset = match size {
                Size::Large => 0,
                Size::Mixed => self.made * 1777 % 0x4000,
            };
            let wanted = match size {
                Size::Large => SLOT,
                Size::Mixed => 512 * (1 + self.made * 7 % 40),
            };
            let gpa = HIGH + number * SLOT + offset;
            self.add_at(slot, gpa, wanted)?;
        }
        Ok(())
    }

    /// Makes a read of up to `wanted` bytes into memory at `gpa`, in `slot`.
    pub(super) fn add_at(&mut self, slot: usize, gpa: u64, wanted: u64) -> Result<(), Fault> {
        let (head, len) = self.disk.read(self.made, wanted);
        self.memory.write(gpa, &noise(self.made + 1, len))?;
        self.add_request(slot, head, Buffer { gpa, len })
    }

    /// Makes any request whose data is at `data`, in `slot`.
    pub(super) fn add_request(&mut self, slot: usize, head: BlkRequestHeader, data: Buffer) -> Result<(), Fault> {
        let (head_at, status) = (HEADS + slot as u64 * HEAD, STATUSES + slot as u64 * LOG_PAGE);
        self.made += 1;
        self.memory.write(head_at, head.as_bytes())?;
        self.memory.write(status, &[NO_STATUS])?;
        let reads = head.request_type.get() == VIRTIO_BLK_T_IN;
        let head = Buffer { gpa: head_at, len: size_of_val(&head) as u32 };
        let status = Buffer { gpa: status, len: 1 };
        self.lent.insert(status.gpa / LOG_PAGE);
        let added = if reads {
            self.lent.extend(pages(data.gpa, data.len.into()));
            self.driver.add(&[head], &[data, status], None)?
        } else {
            self.driver.add(&[head, data], &[status], None)?
        };
        if let Some(free) = self.heads.get_mut(slot) {
            *free = added;
        }
        Ok(())
    }

    /// Makes what was added visible, and kicks if the device wants it.
    pub(super) fn publish(&mut self) {
        if self.driver.publish() {
            self.wake();
        }
    }

    /// Takes one completion, if there is one.
    pub(super) fn pop(&mut self) -> Result<bool, Fault> {
        let Some(used) = self.driver.pop_used()? else { return Ok(false) };
        let Some(slot) = self.heads.iter().position(|head| *head == Some(used.head)) else { return Ok(true) };
        if let Some(head) = self.heads.get_mut(slot) {
            *head = None;
        }
        let mut status = [NO_STATUS];
        self.memory.read(STATUSES + slot as u64 * LOG_PAGE, &mut status)?;
        match status {
            [NO_STATUS] => Err(Fault::Breach("a request was completed without a status".into())),
            [status] if Disk::worked(status) => Ok(true),
            [status] => Err(Fault::Breach(format!("a read failed with status {status}"))),
        }
    }

    /// Waits until nothing is in flight.
    pub(super) fn finish(&mut self) -> Result<(), Fault> {
        let deadline = Instant::now() + self.timeout;
        while self.driver.outstanding() > 0 {
            if self.pop()? || self.driver.enable_notifications() {
                continue;
            }
            let notified = readable(self.call.as_fd(), deadline);
            let _ = self.call.read();
            if !notified {
                let left = self.driver.outstanding();
                let late = self.pop()?;
                let what = if late { "notification" } else { "answer" };
                let waited = self.timeout;
                return Err(Fault::Breach(format!("{left} requests without {what} within {waited:?}")));
            }
        }
        Ok(())
    }

    /// A batch of reads, from adding to completion.
    pub(super) fn load(&mut self, count: u64, size: Size) -> Result<(), Fault> {
        self.add(count, size)?;
        self.publish();
        self.finish()
    }

    /// Stops the ring; the base (rule R3).
    pub(super) fn stop(&self) -> Result<u32, Fault> {
        let reply = self.link.ask(Code::GET_VRING_BASE, VringState { index: 0, num: 0 }.as_bytes())?;
        let VringState { index, num } = reply.read()?;
        match index {
            0 => Ok(num),
            other => Err(Fault::Breach(format!("GET_VRING_BASE of ring 0 was answered for ring {other}"))),
        }
    }

    /// The used index as it stands in memory.
    pub(super) fn used_index(&self) -> Result<u16, Fault> {
        let mut bytes = [0; 2];
        self.memory.read(self.layout.used + 2, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    /// A hash of every page of guest memory.
    pub(super) fn hashes(&self) -> Result<Vec<(u64, u64)>, Fault> {
        let mut hashes = Vec::new();
        let mut page = [0; LOG_PAGE as usize];
        for region in self.memory.regions() {
            for gpa in (region.gpa()..region.gpa() + region.size()).step_by(LOG_PAGE as usize) {
                self.memory.read(gpa, &mut page)?;
                hashes.push((gpa / LOG_PAGE, XxHash3_64::oneshot(&page)));
            }
        }
        Ok(hashes)
    }

    /// Pages that only the driver writes, and so has changed itself.
    pub(super) fn own(&self) -> Pages {
        let size = u32::from(self.layout.size);
        let desc = pages(self.layout.desc, desc_table_bytes(size));
        let avail = pages(self.layout.avail, avail_ring_bytes(size));
        desc.chain(avail).chain(pages(HEADS, SLOTS * HEAD)).collect()
    }

    /// Pages of the used ring.
    pub(super) fn used_ring(&self) -> Pages {
        pages(self.layout.used, used_ring_bytes(self.layout.size.into())).collect()
    }

    /// Makes a log and installs it.
    pub(super) fn install_log(&self) -> Result<Log, Fault> {
        let (log, fd) = Log::create(self.memory.end())?;
        self.send_log(&fd, log.size(), 0)?;
        Ok(log)
    }

    /// SET_LOG_BASE; bytes of the reply (rule F7).
    pub(super) fn send_log(&self, fd: &OwnedFd, mmap_size: u64, mmap_offset: u64) -> Result<usize, Fault> {
        self.offer.need(protocol_feature::LOG_SHMFD)?;
        if !self.offer.has(VHOST_F_LOG_ALL) {
            return Err(Fault::NotOffered("VHOST_F_LOG_ALL".into()));
        }
        let description = LogDescription { mmap_size, mmap_offset };
        self.link.send(Code::SET_LOG_BASE, Header::FLAG_VERSION, description.as_bytes(), &[fd.as_fd()])?;
        Ok(self.link.reply(Code::SET_LOG_BASE)?.payload.len())
    }

    /// LOG_ALL on or off.
    pub(super) fn log_data(&self, yes: bool) -> Result<(), Fault> {
        let features = self.features | u64::from(yes) << VHOST_F_LOG_ALL;
        self.done(Code::SET_FEATURES, features.as_bytes(), &[])
    }

    /// F_LOG of the ring, with its log address, or off.
    pub(super) fn log_used(&self, log_at: Option<u64>) -> Result<(), Fault> {
        self.done(Code::SET_VRING_ADDR, self.addr(log_at).as_bytes(), &[])
    }

    /// LOG_ALL, then F_LOG with the ring at `log_at` (rule L7).
    pub(super) fn log_on(&self, log_at: u64) -> Result<(), Fault> {
        self.log_data(true)?;
        self.log_used(Some(log_at))
    }

    /// Watches for a while in which nothing may happen.
    pub(super) fn watch(&self) {
        thread::sleep(self.settle);
    }
}

/// A region as messages describe it.
pub(super) fn describe(region: &Region) -> MemoryRegion {
    MemoryRegion {
        guest_phys_addr: region.gpa(),
        memory_size: region.size(),
        userspace_addr: region.user_addr(),
        mmap_offset: region.shared().map_or(0, |(_, offset)| offset),
    }
}

/// The pages of a range of bytes, which is not empty.
pub(super) fn pages(gpa: u64, len: u64) -> impl Iterator<Item = u64> {
    gpa / LOG_PAGE..=(gpa + len - 1) / LOG_PAGE
}

/// The pages whose hash differs.
pub(super) fn changed(before: &[(u64, u64)], after: &[(u64, u64)]) -> Pages {
    before.iter().zip(after).filter(|(before, after)| before != after).map(|(_, (page, _))| *page).collect()
}

/// Takes the marked pages out of a log.
pub(super) fn harvest(log: &Log) -> Pages {
    let mut set = PageSet::new(log.pages());
    log.harvest(&mut set);
    set.runs().flatten().collect()
}

/// Bytes that no disk holds by chance, different for each `seed`.
pub(super) fn noise(seed: u64, len: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words = (0..len.div_ceil(8)).flat_map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state ^ state >> 32).to_le_bytes()
    });
    words.take(len as usize).collect()
}
