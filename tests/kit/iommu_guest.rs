//! An IOMMU for tests: guest memory scattered page by page over I/O virtual addresses, and a thread that answers
//! misses.
//!
//! As in rings, the type of the driver's addresses is `GuestAddress`, though they are I/O virtual addresses.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost_migrate::abi::vhost::{
    VHOST_IOTLB_ACCESS_FAIL, VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_MISS, VHOST_IOTLB_UPDATE,
};
use vhost_migrate::abi::vhost_user::{
    BackendRequest, FrontendRequest as Code, Header, IotlbMsg, ProtocolFeatures, VringAddr, VringState,
};
use vhost_migrate::abi::virtio::{VIRTIO_F_ACCESS_PLATFORM, VirtioFeatures};
use vhost_migrate::memory::{Access, Address, GuestAddress, Iotlb, Iova, IovaWindow, LOG_PAGE, Memory, UserAddress};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::guest::{BASIC, Guest, HIGH, PROTOCOL, REGION, Ring, pages};
use crate::raw::{RawFrontend, VERSION};

/// All I/O virtual addresses begin here, where there is no guest memory.
pub(crate) const BASE: GuestAddress = GuestAddress(0x70_0000_0000);
/// I/O virtual address of the buffers of rings.
pub(crate) const DATA: GuestAddress = GuestAddress(BASE.0 + (16 << 20));
pub(crate) const FEATURES: VirtioFeatures = BASIC.union(VIRTIO_F_ACCESS_PLATFORM);
/// The protocol features that translation needs.
pub(crate) const CHANNEL: ProtocolFeatures = PROTOCOL.union(ProtocolFeatures::BACKEND_REQ);

/// Pseudo-random numbers, the same in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// A guest behind an IOMMU, and its connection.
pub(crate) struct IommuGuest {
    pub(crate) guest: Guest,
    pub(crate) client: RawFrontend,
    pub(crate) iommu: Arc<Iommu>,
    thread: Option<JoinHandle<()>>,
    channel: Option<UnixStream>,
}

/// Answers misses.
pub(crate) struct Iommu {
    updates: RawFrontend,
    /// User address and permission, by I/O virtual page.
    pub(crate) map: Mutex<BTreeMap<u64, (UserAddress, u8)>>,
    pub(crate) silent: AtomicBool,
    pub(crate) misses: AtomicU64,
    pub(crate) failures: AtomicU64,
}

impl Iommu {
    /// Sends an update or an invalidation without waiting.
    pub(crate) fn tell(&self, message: &IotlbMsg) {
        self.updates.send_body(Code::IOTLB_MSG, message);
    }

    fn serve_misses(&self, mut channel: UnixStream) {
        let mut head = [0; size_of::<Header>()];
        while channel.read_exact(&mut head).is_ok() {
            let header: Header = zerocopy::transmute!(head);
            let mut body = vec![0; header.size as usize];
            channel.read_exact(&mut body).unwrap();
            assert_eq!(BackendRequest(header.request), BackendRequest::IOTLB_MSG);
            let asked = IotlbMsg::read_from_bytes(&body).unwrap();
            let found = match asked.kind {
                VHOST_IOTLB_MISS if self.silent.load(Ordering::SeqCst) => continue,
                VHOST_IOTLB_MISS => {
                    self.misses.fetch_add(1, Ordering::SeqCst);
                    self.send_translation(&asked)
                }
                VHOST_IOTLB_ACCESS_FAIL => {
                    self.failures.fetch_add(1, Ordering::SeqCst);
                    true
                }
                kind => panic!("a back-end sends no message of kind {kind}"),
            };
            if header.flags & Header::FLAG_NEED_REPLY != 0 {
                let reply = Header { request: header.request, flags: Header::REPLY_FLAGS, size: 8 };
                let _ = channel.write_all(&[reply.as_bytes(), u64::from(!found).as_bytes()].concat());
            }
        }
    }

    /// Sends the translation while the map is locked, so that it is current.
    fn send_translation(&self, asked: &IotlbMsg) -> bool {
        let map = self.map.lock().unwrap();
        let page = asked.iova / LOG_PAGE;
        let Some((user, perm)) = map.get(&page).copied() else { return false };
        self.tell(&update(Iova(page * LOG_PAGE), LOG_PAGE, user, perm));
        true
    }
}

/// The I/O virtual address that a ring has in place of a guest-physical one.
pub(crate) fn iova(address: GuestAddress) -> Iova {
    Iova(address.0)
}

/// The start of the page that has this address.
pub(crate) fn page_at(address: GuestAddress) -> GuestAddress {
    GuestAddress(address.0 / LOG_PAGE * LOG_PAGE)
}

pub(crate) fn update(iova: Iova, size: u64, user: UserAddress, perm: u8) -> IotlbMsg {
    IotlbMsg { iova: iova.0, size, uaddr: user.0, perm, kind: VHOST_IOTLB_UPDATE, ..IotlbMsg::new_zeroed() }
}

pub(crate) fn invalidate(iova: Iova, size: u64) -> IotlbMsg {
    IotlbMsg { iova: iova.0, size, kind: VHOST_IOTLB_INVALIDATE, ..IotlbMsg::new_zeroed() }
}

impl IommuGuest {
    /// Connects, and maps 16 MiB of I/O virtual addresses from [`BASE`] and 8 MiB from [`DATA`] to pages of both regions.
    pub(crate) fn new(client: RawFrontend, features: VirtioFeatures) -> IommuGuest {
        IommuGuest::of(Guest::new(), client, features)
    }

    pub(crate) fn of(guest: Guest, client: RawFrontend, features: VirtioFeatures) -> IommuGuest {
        client.send_body(Code::SET_OWNER, &[0u8; 0]);
        client.send_body(Code::SET_PROTOCOL_FEATURES, &CHANNEL);
        let (ours, theirs) = UnixStream::pair().unwrap();
        client.send_acknowledged(Code::SET_BACKEND_REQ_FD, &[0u8; 0], &[theirs.as_fd()]);
        client.send_acknowledged(Code::SET_FEATURES, &features, &[]);
        guest.send_table(&client);
        let mut pages: Vec<u64> = (0..REGION / LOG_PAGE).flat_map(|page| [page, HIGH.0 / LOG_PAGE + page]).collect();
        let mut dice = Random(7);
        let numbers = (BASE.0 / LOG_PAGE..).take((24 << 20) / LOG_PAGE as usize);
        let map = numbers.map(|number| {
            let gpa = pages.swap_remove(dice.below(pages.len() as u64) as usize) * LOG_PAGE;
            (number, (guest.user(GuestAddress(gpa)), 3))
        });
        let iommu = Arc::new(Iommu {
            updates: RawFrontend { socket: client.socket.try_clone().unwrap() },
            map: Mutex::new(map.collect()),
            silent: AtomicBool::new(false),
            misses: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        });
        let (hears, channel) = (iommu.clone(), ours.try_clone().unwrap());
        let thread = std::thread::spawn(move || hears.serve_misses(channel));
        IommuGuest { guest, client, iommu, thread: Some(thread), channel: Some(ours) }
    }

    /// The guest-physical address of an address of the driver.
    pub(crate) fn gpa(&self, address: GuestAddress) -> GuestAddress {
        let (user, _) = self.iommu.map.lock().unwrap()[&(address.0 / LOG_PAGE)];
        self.guest.memory.gpa_of_user(user, LOG_PAGE).unwrap().unchecked_add(address.0 % LOG_PAGE)
    }

    /// The guest-physical pages of a range of the driver.
    pub(crate) fn pages(&self, address: GuestAddress, len: u64) -> impl Iterator<Item = u64> {
        pages(address, len).map(|page| self.gpa(GuestAddress(page * LOG_PAGE)).0 / LOG_PAGE)
    }

    /// A range as the driver sees it: contiguous.
    pub(crate) fn driver_memory(&self, address: GuestAddress, len: u64) -> Memory {
        let iotlb = Iotlb::default();
        for (page, (user, _)) in self.iommu.map.lock().unwrap().iter() {
            iotlb.update(Iova(page * LOG_PAGE), LOG_PAGE, *user, Some(Access::ReadWrite)).unwrap();
        }
        let area = [(iova(address), len, Access::Read)];
        IovaWindow::open(&self.guest.memory, &iotlb, &area, None).unwrap().memory().clone()
    }

    /// A ring with scattered parts. Its buffers have addresses of [`Space::view`].
    pub(crate) fn ring(&self, index: u32, size: u16, features: VirtioFeatures) -> Ring {
        Ring::at(&self.driver_memory(BASE, 24 << 20), BASE.unchecked_add(u64::from(index) << 20), index, size, features)
    }

    pub(crate) fn addr(&self, ring: &Ring) -> VringAddr {
        VringAddr {
            index: ring.index,
            flags: u32::from(ring.log_at.is_some()),
            desc_user_addr: ring.layout.desc.0,
            used_user_addr: ring.layout.used.0,
            avail_user_addr: ring.layout.avail.0,
            log_guest_addr: ring.log_at.map_or(u64::MAX, |at| at.0),
        }
    }

    /// Starts a ring. Returns its error eventfd.
    pub(crate) fn start(&self, ring: &Ring, base: u32) -> EventFd {
        let (client, index) = (&self.client, ring.index);
        let number = u64::from(index);
        let error = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
        client.send(Code::SET_VRING_CALL, VERSION, number.as_bytes(), &[ring.call.as_fd()]);
        client.send(Code::SET_VRING_ERR, VERSION, number.as_bytes(), &[error.as_fd()]);
        client.send_body(Code::SET_VRING_NUM, &VringState { index, num: ring.layout.size.into() });
        client.send_body(Code::SET_VRING_BASE, &VringState { index, num: base });
        client.send_body(Code::SET_VRING_ADDR, &self.addr(ring));
        client.send(Code::SET_VRING_KICK, VERSION, number.as_bytes(), &[ring.kick.as_fd()]);
        ring.enable(client, true);
        error
    }

    /// Changes translations, and waits until the back-end has acknowledged the invalidation of the old ones.
    pub(crate) fn remap(&self, pages: impl IntoIterator<Item = (GuestAddress, Option<(UserAddress, u8)>)>) {
        let mut changed = Vec::new();
        let mut map = self.iommu.map.lock().unwrap();
        for (page, to) in pages {
            match to {
                Some(to) => drop(map.insert(page.0 / LOG_PAGE, to)),
                None => drop(map.remove(&(page.0 / LOG_PAGE))),
            }
            changed.push(iova(page));
        }
        drop(map);
        for iova in changed {
            self.client.send_acknowledged(Code::IOTLB_MSG, &invalidate(iova, LOG_PAGE), &[]);
        }
    }
}

impl Drop for IommuGuest {
    fn drop(&mut self) {
        if let Some(channel) = self.channel.take() {
            let _ = channel.shutdown(std::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            // A failure of the thread is reported only if the test has not failed.
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the IOMMU's thread has failed");
        }
    }
}
