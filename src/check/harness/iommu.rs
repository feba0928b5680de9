//! The IOMMU of the guest: I/O virtual addresses of the driver, and replies to the device's misses (rule T1.3).
//!
//! I/O virtual addresses have the values of guest-physical ones, but each page is mapped to another page. An
//! untranslated access therefore hits a page where none is expected. A thread answers misses independent of the checks.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{HIGH, HIGH_BYTES, Harness, LOW_BYTES, user_addr};
use crate::abi::vhost::{
    VHOST_ACCESS_RW, VHOST_IOTLB_ACCESS_FAIL, VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_MISS, VHOST_IOTLB_UPDATE,
};
use crate::abi::vhost_user::{BackendRequest, FrontendRequest as Code, Header, IotlbMsg};
use crate::check::connection::BackendMessage;
use crate::check::outcome::CheckAbort;
use crate::check::queue::RING_SLOT_BYTES;
use crate::memory::{Access, GuestAddress, Iotlb, Iova, IovaWindow, LOG_PAGE, Memory};
use crate::sys::with_causes::with_causes;
use crate::sys::{lock, socket};

/// Pages that stay contiguous where rings must be: those of one ring.
const BLOCK_PAGES: u64 = RING_SLOT_BYTES / LOG_PAGE;

/// Scattering of the lower region, which holds the rings. Data is always scattered by pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::check) enum Scatter {
    /// Each ring is contiguous at another place.
    Rings,
    /// Each page is at another place.
    Pages,
}

/// The IOMMU of a harness.
pub(in crate::check) struct GuestIommu {
    state: Arc<Mutex<IommuState>>,
    /// Guest memory as the driver sees it.
    pub(in crate::check) view: Memory,
    /// Thread for the current back-end channel.
    miss_thread: RefCell<Option<MissThread>>,
}

/// Mappings of the driver, and misses of the device.
struct IommuState {
    memory: Memory,
    /// Guest-physical page and permission, by I/O virtual page.
    map: BTreeMap<u64, (u64, u8)>,
    /// Pages whose misses are answered later, and those that have missed.
    deferred_pages: BTreeSet<u64>,
    deferred_misses: BTreeSet<u64>,
    /// Number of misses of each page.
    miss_counts: BTreeMap<u64, u64>,
    /// A protocol violation of the device.
    violation: Option<String>,
}

/// Front-end's end of a back-end channel. Its thread ends when it is dropped.
struct MissThread {
    socket: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Drop for MissThread {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl GuestIommu {
    pub(super) fn new(memory: &Memory, scatter: Scatter) -> Result<GuestIommu, CheckAbort> {
        let block = if scatter == Scatter::Rings { BLOCK_PAGES } else { 1 };
        let (low, high) = (shuffled(0, LOW_BYTES, block), shuffled(HIGH.0, HIGH_BYTES, 1));
        let map = low.chain(high).map(|(page, place)| (page, (place, VHOST_ACCESS_RW))).collect();
        let (deferred_pages, deferred_misses, miss_counts) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
        let state =
            IommuState { memory: memory.clone(), map, deferred_pages, deferred_misses, miss_counts, violation: None };
        let view = state.view()?;
        Ok(GuestIommu { state: Arc::new(Mutex::new(state)), view, miss_thread: RefCell::default() })
    }

    /// Returns the socket of a new back-end channel. Its misses are answered over `connection`. Acknowledgements time
    /// out after half of `timeout`, so that a device that does not read them is reported in time.
    pub(super) fn channel(&self, connection: UnixStream, timeout: Duration) -> Result<OwnedFd, CheckAbort> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_write_timeout(Some(timeout / 2))?;
        let (channel, state) = (ours.try_clone()?, self.state.clone());
        let thread =
            thread::Builder::new().name("iommu".into()).spawn(move || answer(&channel, &connection, &state))?;
        *self.miss_thread.borrow_mut() = Some(MissThread { socket: ours, thread: Some(thread) });
        Ok(theirs.into())
    }

    /// Returns the guest-physical page of an I/O virtual page.
    pub(in crate::check) fn guest_page(&self, page: u64) -> u64 {
        self.lock().map.get(&page).map_or(page, |(place, _)| *place)
    }

    /// Changes the permission of a page, without an invalidation.
    pub(in crate::check) fn permit(&self, page: u64, permission: u8) {
        if let Some((_, permitted)) = self.lock().map.get_mut(&page) {
            *permitted = permission;
        }
    }

    /// Defers the replies to misses of these pages until [`release`](Harness::release).
    pub(in crate::check) fn hold_answers(&self, pages: impl IntoIterator<Item = u64>) {
        self.lock().deferred_pages.extend(pages);
    }

    /// Returns the number of misses of a page.
    pub(in crate::check) fn asked(&self, page: u64) -> u64 {
        self.lock().miss_counts.get(&page).copied().unwrap_or_default()
    }

    /// Returns the number of misses.
    ///
    /// # Errors
    /// [`CheckAbort::Violation`] if the device has violated the protocol.
    pub(in crate::check) fn misses(&self) -> Result<u64, CheckAbort> {
        let state = self.lock();
        match &state.violation {
            None => Ok(state.miss_counts.values().sum()),
            Some(violation) => Err(CheckAbort::Violation(violation.clone())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, IommuState> {
        lock(&self.state)
    }
}

impl Harness {
    /// Returns guest memory as the driver sees it.
    pub(in crate::check) fn view(&self) -> &Memory {
        self.iommu.as_ref().map_or(&self.memory, |iommu| &iommu.view)
    }

    /// Returns the IOMMU, or fails without one.
    pub(in crate::check) fn iommu(&self) -> Result<&GuestIommu, CheckAbort> {
        self.iommu.as_ref().ok_or_else(|| CheckAbort::NotOffered("ACCESS_PLATFORM".into()))
    }

    /// Converts the driver's pages to guest-physical pages.
    pub(in crate::check) fn guest_pages(&self, pages: impl Iterator<Item = u64>) -> impl Iterator<Item = u64> {
        pages.map(|page| self.iommu.as_ref().map_or(page, |iommu| iommu.guest_page(page)))
    }

    /// Sends an invalidation. When it returns, the old pages are no longer in use (rule T3.1).
    pub(in crate::check) fn invalidate(&self, iova: Iova, bytes: u64) -> Result<(), CheckAbort> {
        let message = IotlbMsg { iova: iova.0, size: bytes, kind: VHOST_IOTLB_INVALIDATE, ..IotlbMsg::new_zeroed() };
        self.send_acked(Code::IOTLB_MSG, message.as_bytes(), &[])
    }

    /// Swaps the mappings of pages, and leaves the contents in place. Neither the device nor the driver's view changes
    /// before [`invalidate`](Harness::invalidate) and [`refresh_view`](Harness::refresh_view).
    pub(in crate::check) fn swap_pages(&self, pairs: impl IntoIterator<Item = (u64, u64)>) -> Result<(), CheckAbort> {
        let map = &mut self.iommu()?.lock().map;
        for (one, other) in pairs {
            if let (Some(here), Some(there)) = (map.get(&one).copied(), map.get(&other).copied()) {
                map.insert(one, there);
                map.insert(other, here);
            }
        }
        Ok(())
    }

    /// Updates the driver's view to the current mappings.
    pub(in crate::check) fn refresh_view(&mut self) -> Result<(), CheckAbort> {
        if let Some(iommu) = &mut self.iommu {
            let view = iommu.lock().view()?;
            iommu.view = view;
        }
        Ok(())
    }

    /// Sends the deferred replies, and defers no more.
    pub(in crate::check) fn release(&self) -> Result<(), CheckAbort> {
        let mut state = self.iommu()?.lock();
        state.deferred_pages.clear();
        for page in std::mem::take(&mut state.deferred_misses) {
            let message = state.update(page);
            self.connection.send(Code::IOTLB_MSG, Header::FLAG_VERSION, message.as_bytes(), &[])?;
        }
        Ok(())
    }
}

impl IommuState {
    /// Builds the translation of a page; without a mapping it has no permission.
    fn update(&self, page: u64) -> IotlbMsg {
        let (place, perm) = self.map.get(&page).copied().unwrap_or_default();
        let uaddr = user_addr(&self.memory, GuestAddress(place * LOG_PAGE)).0;
        let iova = page * LOG_PAGE;
        IotlbMsg { iova, size: LOG_PAGE, uaddr, perm, kind: VHOST_IOTLB_UPDATE, ..IotlbMsg::new_zeroed() }
    }

    /// Builds guest memory in the order of I/O virtual addresses.
    fn view(&self) -> Result<Memory, CheckAbort> {
        let iotlb = Iotlb::default();
        for (page, (place, _)) in &self.map {
            let user = user_addr(&self.memory, GuestAddress(place * LOG_PAGE));
            let known = iotlb.update(Iova(page * LOG_PAGE), LOG_PAGE, user, Some(Access::ReadWrite));
            known.map_err(|error| CheckAbort::System(std::io::Error::other(error)))?;
        }
        let areas = [(Iova(0), LOW_BYTES, Access::ReadWrite), (Iova(HIGH.0), HIGH_BYTES, Access::ReadWrite)];
        let window = IovaWindow::open(&self.memory, &iotlb, &areas, None);
        Ok(window.map_err(|error| CheckAbort::System(std::io::Error::other(error)))?.memory().clone())
    }

    /// Handles a message of the device. Returns its acknowledgement. The translation is sent over `connection` under
    /// the lock, before the mapping can change (rule T3.5).
    fn handle(&mut self, message: &BackendMessage, connection: &UnixStream) -> Result<u64, CheckAbort> {
        let (code, body) = (message.code, &message.body);
        if code != BackendRequest::IOTLB_MSG {
            // Not an IOTLB message.
            return Ok(0);
        }
        let miss = match IotlbMsg::read_from_bytes(body) {
            Ok(message) if message.kind == VHOST_IOTLB_MISS => message,
            Ok(IotlbMsg { kind: VHOST_IOTLB_ACCESS_FAIL, .. }) => return Ok(0),
            Ok(IotlbMsg { kind, .. }) => {
                self.violation = Some(format!("it sent {code} of kind {kind}"));
                return Ok(0);
            }
            Err(_) => {
                self.violation = Some(format!("it sent {code} of {} bytes", body.len()));
                return Ok(0);
            }
        };
        let page = miss.iova / LOG_PAGE;
        *self.miss_counts.entry(page).or_default() += 1;
        if self.deferred_pages.contains(&page) {
            self.deferred_misses.insert(page);
            return Ok(0);
        }
        let update = self.update(page);
        if update.perm == 0 && message.needs_reply {
            return Ok(1);
        }
        let size = size_of_val(&update) as u32;
        let header = Header { request: Code::IOTLB_MSG.0, flags: Header::FLAG_VERSION, size };
        match socket::send(connection.as_fd(), &[header.as_bytes(), update.as_bytes()].concat(), &[]) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Err(CheckAbort::Violation("it requests translations and does not read them".into()))
            }
            // A closed connection shows in the check itself.
            _ => Ok(0),
        }
    }
}

/// Answers the device until the channel is closed or the device violates the protocol.
fn answer(channel: &UnixStream, connection: &UnixStream, state: &Mutex<IommuState>) {
    let next = || {
        let Some(message) = BackendMessage::receive(channel)? else { return Ok(false) };
        let answer = lock(state).handle(&message, connection)?;
        message.acknowledge(channel, answer).map(|()| true)
    };
    loop {
        match next() {
            Ok(true) => {}
            Ok(false) => return,
            Err(abort) => return lock(state).violation = Some(with_causes(&abort).to_string()),
        }
    }
}

/// Returns a permutation of a region's pages in blocks, without fixed points.
fn shuffled(at: u64, bytes: u64, block: u64) -> impl Iterator<Item = (u64, u64)> {
    let (first, blocks) = (at / LOG_PAGE, bytes / LOG_PAGE / block);
    let place = move |page: u64| (page / block * 1001 + 333) % blocks * block + page % block;
    (0..blocks * block).map(move |page| (first + page, first + place(page)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffled_pages_are_a_permutation_without_fixed_points() {
        for (at, bytes, block) in [(0, LOW_BYTES, BLOCK_PAGES), (0, LOW_BYTES, 1), (HIGH.0, HIGH_BYTES, 1)] {
            let pages: BTreeMap<u64, u64> = shuffled(at, bytes, block).collect();
            assert!(pages.iter().all(|(page, place)| page != place));
            let places: BTreeSet<u64> = pages.values().copied().collect();
            assert_eq!(places, pages.keys().copied().collect());
            assert_eq!(places.len() as u64, bytes / LOG_PAGE);
            let next = |page: u64, place: u64| pages.get(&(page + 1)) == Some(&(place + 1));
            let neighbours = pages.iter().filter(|(page, place)| next(**page, **place)).count() as u64;
            assert_eq!(neighbours, bytes / LOG_PAGE / block * (block - 1), "only blocks stay in one piece");
        }
    }
}
