//! vhost-vsock: a byte stream between a driver and a program of the host (rules K1.5, K1.6, K4.2).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::libc;
use vhost_migrate::abi::virtio::{VIRTIO_F_VERSION_1, VirtioFeatures};
use vhost_migrate::dirty::Log;
use vhost_migrate::frontend::{Device, FrontendError, KernelDevice, KernelOptions};
use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory, PageNumber};
use vhost_migrate::ring::{RingBase, UsedBuffer};

use crate::modules::load;
use crate::rings::{Ring, changed, page, region, snapshot};
use crate::wait::is_readable;

const RECEIVE: u16 = 0;
const SEND: u16 = 1;
const FEATURES: VirtioFeatures = VIRTIO_F_VERSION_1;
const HOST: u64 = 2;
/// Port of the guest's socket.
const GUEST_PORT: u32 = 5000;
/// Pages of buffers: one to send, the others to receive.
const SEND_PAGE: u64 = 99;
pub(crate) const RECEIVE_PAGES: std::ops::Range<u64> = 100..108;
/// Operations of packets (virtio 1.2, "Socket Device").
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RW: u16 = 5;

/// A packet of a stream.
#[derive(Debug, PartialEq)]
struct Packet {
    op: u16,
    ports: (u32, u32),
    data: Vec<u8>,
}

const HEADER: usize = 44;

/// A guest with one stream socket.
pub(crate) struct Vsock {
    cid: u64,
    pub(crate) memory: Memory,
    pub(crate) device: Box<dyn Device>,
    pub(crate) rings: [Ring; 2],
    /// Pages of the receive buffers, in the order in which they are used.
    buffers: std::iter::Cycle<std::ops::Range<u64>>,
    /// Pages of the receive buffers that the device has used.
    pub(crate) used: Vec<u64>,
}

impl Vsock {
    fn new(cid: u64) -> Vsock {
        Vsock::with(cid, |device| Box::new(device))
    }

    /// A guest with the device that `wrap` makes of the kernel's.
    pub(crate) fn with(cid: u64, wrap: impl Fn(KernelDevice) -> Box<dyn Device>) -> Vsock {
        load("vhost_vsock");
        let memory = Memory::new([region(0, 256)]).unwrap();
        let rings = [4, 8].map(|page| Ring::new(&memory, page, FEATURES));
        let mut device = wrap(KernelDevice::vsock(cid, KernelOptions::default()).unwrap());
        device.set_features(FEATURES).unwrap();
        device.set_memory(&memory).unwrap();
        let mut vsock = Vsock { cid, memory, device, rings, buffers: RECEIVE_PAGES.cycle(), used: vec![] };
        for page in RECEIVE_PAGES {
            vsock.rings[0].add(page, LOG_PAGE as u32, true);
        }
        vsock
    }

    pub(crate) fn start(&mut self, index: u16) {
        self.device.start_ring(index, self.rings[usize::from(index)].setup.clone()).unwrap();
    }

    pub(crate) fn stop(&mut self, index: u16) -> RingBase {
        let base = self.device.stop_ring(index).unwrap();
        self.rings[usize::from(index)].setup.base = base;
        base
    }

    fn send(&mut self, port: u32, op: u16, data: &[u8]) {
        let len = data.len() as u32;
        let packet = [
            &self.cid.to_le_bytes()[..],
            &HOST.to_le_bytes(),
            &GUEST_PORT.to_le_bytes(),
            &port.to_le_bytes(),
            &len.to_le_bytes(),
            &1u16.to_le_bytes(), // a stream
            &op.to_le_bytes(),
            &0u32.to_le_bytes(),
            &(256u32 << 10).to_le_bytes(), // space of the receiver
            &0u32.to_le_bytes(),
            data,
        ];
        self.memory.write(PageNumber(SEND_PAGE).address(), &packet.concat()).unwrap();
        self.rings[usize::from(SEND)].add(SEND_PAGE, HEADER as u32 + len, false);
        self.rings[usize::from(SEND)].completion();
    }

    /// Receives a packet that is no update of the sender's credit.
    fn receive(&mut self) -> Packet {
        loop {
            let used = self.rings[usize::from(RECEIVE)].completion();
            let packet = self.packet(&used);
            if (1..=RW).contains(&packet.op) {
                return packet;
            }
        }
    }

    /// Reads the packet in a buffer, which is added to the ring again.
    fn packet(&mut self, used: &UsedBuffer) -> Packet {
        let number = self.buffers.next().unwrap();
        self.used.push(number);
        let bytes = page(&self.memory, number);
        self.rings[usize::from(RECEIVE)].add(number, LOG_PAGE as u32, true);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let data = bytes[HEADER..used.len as usize].to_vec();
        assert_eq!(data.len(), word(24) as usize);
        Packet { op: u16::from_le_bytes([bytes[30], bytes[31]]), ports: (word(16), word(20)), data }
    }

    /// Stops the rings, and reads the packets that are left.
    pub(crate) fn stop_all(&mut self) {
        self.stop(SEND);
        self.stop(RECEIVE);
        while let Some(used) = self.rings[usize::from(RECEIVE)].driver.pop_used().unwrap() {
            assert!(!(1..=RW).contains(&self.packet(&used).op), "a packet that was not expected");
        }
    }

    pub(crate) fn start_all(&mut self) {
        self.start(SEND);
        self.start(RECEIVE);
    }

    /// Connects to a listener of the host.
    pub(crate) fn connect(&mut self, listener: &Listener) -> File {
        self.send(listener.port, REQUEST, &[]);
        assert_eq!(self.receive(), Packet { op: RESPONSE, ports: (listener.port, GUEST_PORT), data: vec![] });
        listener.accept()
    }

    /// Moves bytes in both directions.
    pub(crate) fn exchange(&mut self, listener: &Listener, stream: &mut File, round: u8) {
        let (there, back) = ([round; 1000], [!round; 1500]);
        self.send(listener.port, RW, &there);
        let mut bytes = [0; 1000];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, there);
        stream.write_all(&back).unwrap();
        assert_eq!(self.receive(), Packet { op: RW, ports: (listener.port, GUEST_PORT), data: back.to_vec() });
    }
}

/// A listening socket of the host.
pub(crate) struct Listener {
    port: u32,
    socket: OwnedFd,
}

impl Listener {
    pub(crate) fn new(port: u32) -> Listener {
        // SAFETY: makes a descriptor.
        let fd = Errno::result(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) });
        // SAFETY: the descriptor is new, and nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd.unwrap()) };
        // SAFETY: an address of zeros is valid.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        (address.svm_family, address.svm_port) = (libc::AF_VSOCK as u16, port);
        address.svm_cid = libc::VMADDR_CID_ANY;
        let (pointer, len) = ((&raw const address).cast(), size_of_val(&address) as u32);
        // SAFETY: the address is one of vsock, with its size.
        Errno::result(unsafe { libc::bind(socket.as_raw_fd(), pointer, len) }).unwrap();
        // SAFETY: takes no pointer.
        Errno::result(unsafe { libc::listen(socket.as_raw_fd(), 1) }).unwrap();
        Listener { port, socket }
    }

    fn accept(&self) -> File {
        let none = std::ptr::null_mut();
        // SAFETY: the address of the peer is not asked for.
        let fd = Errno::result(unsafe { libc::accept(self.socket.as_raw_fd(), none, none.cast()) }).unwrap();
        // SAFETY: the descriptor is new, and nothing else owns it.
        unsafe { OwnedFd::from_raw_fd(fd) }.into()
    }
}

#[test]
fn a_stream_carries_bytes_in_both_directions() {
    let mut vsock = Vsock::new(7);
    vsock.start(SEND);
    vsock.start(RECEIVE);
    let listener = Listener::new(1234);
    let mut stream = vsock.connect(&listener);
    for round in 0..50 {
        vsock.exchange(&listener, &mut stream, round);
    }
    let mut cid = [0; 8];
    vsock.device.config(0, &mut cid).unwrap();
    assert_eq!(u64::from_le_bytes(cid), 7);
}

/// Rules K1.5 and K1.6.
#[test]
fn a_stream_goes_on_after_its_rings_were_stopped() {
    let mut vsock = Vsock::new(8);
    vsock.start(SEND);
    vsock.start(RECEIVE);
    let listener = Listener::new(1235);
    let mut stream = vsock.connect(&listener);
    vsock.exchange(&listener, &mut stream, 1);
    // The two rings stop together, and each has its base.
    assert_eq!(vsock.stop(SEND), RingBase::split(2));
    let before = snapshot(&vsock.memory);
    stream.write_all(b"while stopped").unwrap();
    assert!(!is_readable(&vsock.rings[usize::from(SEND)].setup.call.as_fd(), 100u16));
    assert_eq!(changed(&vsock.memory, &before), BTreeSet::new());
    vsock.stop(RECEIVE);
    assert!(matches!(vsock.device.stop_ring(SEND), Err(FrontendError::InvalidRing { .. })));
    vsock.start(RECEIVE);
    vsock.start(SEND);
    assert_eq!(vsock.receive().data, b"while stopped");
    vsock.exchange(&listener, &mut stream, 2);
}

/// Rule K4.2.
#[test]
fn its_incomplete_log_is_refused() {
    let mut vsock = Vsock::new(9);
    let (log, fd) = Log::create(GuestAddress(256 * LOG_PAGE)).unwrap();
    assert_eq!(vsock.device.log_quality(), None);
    assert_eq!(
        vsock.device.start_logging(&Arc::new(log), fd.as_fd()).unwrap_err().to_string(),
        "the device does not offer a complete dirty log: the kernel does not log what vhost-vsock writes to guest \
         memory, although it offers LOG_ALL (rule K4.2); wrap it in shadow::ShadowDevice"
    );
}

#[test]
fn a_context_id_that_is_taken_or_reserved_is_an_error() {
    let vsock = Vsock::new(10);
    let error = |cid| KernelDevice::vsock(cid, KernelOptions::default()).err().map(|error| error.to_string());
    assert_eq!(
        error(10).unwrap(),
        "/dev/vhost-vsock: VHOST_VSOCK_SET_GUEST_CID: another guest has this context id. Use another one"
    );
    for reserved in [0, 1, 2, u64::from(u32::MAX), 1 << 32] {
        assert_eq!(
            error(reserved).unwrap(),
            "/dev/vhost-vsock: VHOST_VSOCK_SET_GUEST_CID: a guest's context id is from 3 to 4294967294. Use one of these"
        );
    }
    drop(vsock);
    assert_eq!(error(10), None, "the dropped device has freed its context id");
}
