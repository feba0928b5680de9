//! A tap, and the host's side of its network.

use std::fs::{self, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;

use nix::errno::Errno;
use nix::libc;

use crate::modules::load;
use crate::wait::is_readable;

/// Ethernet type for experiments. Nothing else on the interface uses it.
const ETHER_TYPE: u16 = 0x88b5;
const PATIENCE: u16 = 20_000;

/// A tap whose interface is up.
pub(crate) struct Tap {
    pub(crate) name: String,
    pub(crate) fd: OwnedFd,
    interface: Interface,
}

/// An interface of this host that is up, and the frames on it.
pub(crate) struct Interface(OwnedFd);

impl Interface {
    pub(crate) fn new(name: &str) -> Interface {
        // The kernel must not send frames of its own.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
        ip(&["link", "set", name, "up"]);
        Interface(packet_socket(name))
    }

    /// Sends a frame on the interface.
    pub(crate) fn send(&self, payload: &[u8]) {
        nix::unistd::write(&self.0, &frame(payload)).unwrap();
    }

    /// Receives a frame that has arrived on the interface.
    pub(crate) fn receive(&self) -> Vec<u8> {
        assert!(is_readable(&self.0, PATIENCE), "no frame");
        let mut bytes = vec![0; 4096];
        let len = nix::unistd::read(&self.0, &mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }
}

impl Tap {
    /// Creates a tap with these flags besides IFF_TAP and IFF_NO_PI.
    pub(crate) fn new(name: &str, flags: libc::c_int) -> Tap {
        load("tun");
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: an ifreq of zeros is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | flags) as i16;
        // SAFETY: TUNSETIFF reads and writes an ifreq.
        Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }).unwrap();
        Tap { name: name.into(), fd: file.into(), interface: Interface::new(name) }
    }

    /// A second descriptor of the tap, for a device.
    pub(crate) fn share(&self) -> OwnedFd {
        self.fd.try_clone().unwrap()
    }

    /// Sends a frame to the guest.
    pub(crate) fn send(&self, payload: &[u8]) {
        self.interface.send(payload);
    }

    /// Receives a frame from the guest.
    pub(crate) fn receive(&self) -> Vec<u8> {
        self.interface.receive()
    }

    /// Makes the tap a port of a bridge.
    pub(crate) fn join(&self, bridge: &str) {
        ip(&["link", "set", &self.name, "master", bridge]);
    }

    /// Removes the interface.
    pub(crate) fn remove(&self) {
        ip(&["link", "delete", &self.name]);
    }
}

/// An Ethernet frame to all.
pub(crate) fn frame(payload: &[u8]) -> Vec<u8> {
    frame_between(mac(1), [0xff; 6], payload)
}

/// An Ethernet frame to one address.
pub(crate) fn frame_between(from: [u8; 6], to: [u8; 6], payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &ETHER_TYPE.to_be_bytes(), payload].concat()
}

/// The address of an interface of a guest.
pub(crate) fn mac(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, number]
}

/// Creates a bridge. It learns which address is behind which tap, and sends no frames of its own.
pub(crate) fn make_bridge(name: &str) {
    load("bridge");
    ip(&["link", "add", name, "type", "bridge"]);
    fs::write(format!("/sys/class/net/{name}/bridge/multicast_snooping"), "0").unwrap();
    drop(Interface::new(name));
}

fn packet_socket(name: &str) -> OwnedFd {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: makes a descriptor.
    let fd = Errno::result(unsafe { libc::socket(libc::AF_PACKET, kind, ETHER_TYPE.to_be().into()) }).unwrap();
    // SAFETY: the descriptor is new, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: an address of zeros is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ETHER_TYPE.to_be();
    address.sll_ifindex = fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).unwrap().trim().parse().unwrap();
    let (pointer, len) = ((&raw const address).cast(), size_of_val(&address) as u32);
    // SAFETY: the address is one of packet sockets, with its size.
    Errno::result(unsafe { libc::bind(fd, pointer, len) }).unwrap();
    socket
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
