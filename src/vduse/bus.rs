//! The vDPA bus: adds and removes devices by generic netlink, and binds them to a driver through sysfs.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, ParseableParametrized,
};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use crate::abi::vdpa::{
    VDPA_ATTR_DEV_NAME, VDPA_ATTR_MGMTDEV_DEV_NAME, VDPA_CMD_DEV_DEL, VDPA_CMD_DEV_NEW, VDPA_GENL_NAME,
    VDPA_GENL_VERSION,
};
use crate::abi::virtio::VIRTIO_CONFIG_S_DRIVER_OK;
use crate::vduse::VduseError;

const BUS: &str = "/sys/bus/vdpa";
/// The management device of VDUSE.
const MANAGEMENT_DEVICE: &str = "vduse";
/// Size of the receive buffer, bytes: larger than any response.
const RESPONSE_BYTES: usize = 8192;

/// A driver of the vDPA bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BusDriver {
    /// virtio_vdpa: the device is a virtio device of this host, such as `/dev/vda`.
    Virtio,
    /// vhost_vdpa: the device is a `/dev/vhost-vdpa-N` for a VMM.
    Vhost,
}

impl BusDriver {
    /// Returns the name of the driver, which is also that of its module.
    pub fn name(self) -> &'static str {
        match self {
            BusDriver::Virtio => "virtio_vdpa",
            BusDriver::Vhost => "vhost_vdpa",
        }
    }

    fn path(self) -> PathBuf {
        Path::new(BUS).join("drivers").join(self.name())
    }

    /// Checks that the driver is loaded.
    ///
    /// # Errors
    /// [`VduseError::NoDriver`].
    pub(super) fn check(self) -> Result<(), VduseError> {
        if self.path().is_dir() { Ok(()) } else { Err(VduseError::NoDriver { driver: self.name() }) }
    }
}

/// A netlink socket to the vDPA bus.
#[derive(Debug)]
pub(super) struct Bus {
    socket: OwnedFd,
    family: u16,
}

impl Bus {
    /// Opens a socket.
    ///
    /// # Errors
    /// The error of the system: `ENOENT` if the kernel has no vDPA bus.
    pub(super) fn open() -> io::Result<Bus> {
        let protocol = SockProtocol::NetlinkGeneric;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        let mut bus = Bus { socket, family: 0 };
        let name = GenlCtrlAttrs::FamilyName(VDPA_GENL_NAME.into());
        let families = bus.request(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![name] })?;
        let id = families.iter().flat_map(|family| &family.nlas).find_map(|attribute| match attribute {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        });
        bus.family = id.ok_or(io::ErrorKind::NotFound)?;
        Ok(bus)
    }

    /// Adds the VDUSE device `name` to the bus. The kernel probes its drivers, so the device must be served meanwhile.
    pub(super) fn add(&self, name: &str) -> io::Result<()> {
        let manager = string(VDPA_ATTR_MGMTDEV_DEV_NAME, MANAGEMENT_DEVICE);
        self.request(VdpaCommand { command: VDPA_CMD_DEV_NEW, attributes: vec![manager, device_name(name)] }).map(drop)
    }

    /// Removes the device `name` from the bus. Its driver resets it, so the device must be served meanwhile. Returns false
    /// if there is no such device, or if it must not be removed: it can then not be destroyed either.
    pub(super) fn remove(&self, name: &str) -> io::Result<bool> {
        let removed = self.request(VdpaCommand { command: VDPA_CMD_DEV_DEL, attributes: vec![device_name(name)] });
        match removed {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EPERM)) => Ok(false),
            removed => removed.map(|_| true),
        }
    }

    /// Sends a request, and waits until the kernel has executed it. Returns the messages of the response.
    fn request<F>(&self, payload: F) -> io::Result<Vec<F>>
    where
        F: GenlFamily + Emitable + ParseableParametrized<[u8], GenlHeader> + std::fmt::Debug,
    {
        let mut message = GenlMessage::from_payload(payload);
        message.set_resolved_family_id(self.family);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let mut payloads = Vec::new();
        loop {
            let mut buffer = vec![0; RESPONSE_BYTES];
            let received = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                received => received?,
            };
            let mut rest = buffer.get(..received).unwrap_or_default();
            while !rest.is_empty() {
                let message = NetlinkMessage::<GenlMessage<F>>::deserialize(rest).map_err(io::Error::other)?;
                match message.payload {
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(payloads),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(message) => payloads.push(message.payload),
                    _ => {}
                }
                // Messages are aligned to 4 bytes.
                let next = (message.header.length as usize).next_multiple_of(4).max(4);
                rest = rest.get(next..).unwrap_or_default();
            }
        }
    }
}

/// A request of the family "vdpa". Responses are not evaluated.
#[derive(Debug)]
struct VdpaCommand {
    command: u8,
    attributes: Vec<DefaultNla>,
}

impl GenlFamily for VdpaCommand {
    fn family_name() -> &'static str {
        VDPA_GENL_NAME
    }

    fn command(&self) -> u8 {
        self.command
    }

    fn version(&self) -> u8 {
        VDPA_GENL_VERSION
    }
}

impl Emitable for VdpaCommand {
    fn buffer_len(&self) -> usize {
        self.attributes.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.attributes.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for VdpaCommand {
    fn parse_with_param(_: &[u8], header: GenlHeader) -> Result<VdpaCommand, DecodeError> {
        Ok(VdpaCommand { command: header.cmd, attributes: Vec::new() })
    }
}

fn device_name(name: &str) -> DefaultNla {
    string(VDPA_ATTR_DEV_NAME, name)
}

/// A string attribute, NUL-terminated.
fn string(kind: u16, text: &str) -> DefaultNla {
    DefaultNla::new(kind, [text.as_bytes(), &[0]].concat())
}

/// Binds the device `name` of the bus to a driver, and to no other from now on.
///
/// # Errors
/// [`VduseError::Bind`].
pub(super) fn bind(name: &str, driver: BusDriver) -> Result<(), VduseError> {
    let refused = |source| VduseError::Bind { name: name.into(), driver: driver.name(), source };
    let device = device_path(name);
    let overridden = fs::write(device.join("driver_override"), driver.name());
    let bound = bound_driver(name);
    if bound.as_deref() == Some(driver.name()) {
        return Ok(());
    }
    overridden.map_err(refused)?;
    if bound.is_some() {
        fs::write(device.join("driver/unbind"), name).map_err(refused)?;
    }
    fs::write(driver.path().join("bind"), name).map_err(refused)
}

/// Unbinds the device `name` from virtio_vdpa if its driver has not started it, because the process that attached it was
/// killed meanwhile. A driver that waits for requests could not be unbound.
///
/// # Errors
/// [`VduseError::Bind`].
pub(super) fn unbind_cut_off(name: &str) -> Result<(), VduseError> {
    let (device, driver) = (device_path(name), BusDriver::Virtio.name());
    let status = |child: String| {
        let text = fs::read_to_string(device.join(child).join("status")).ok()?;
        u8::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
    };
    let has_started =
        names(&device).into_iter().filter_map(status).any(|status| status & VIRTIO_CONFIG_S_DRIVER_OK != 0);
    if has_started || requests_in_flight(name) > 0 || bound_driver(name).as_deref() != Some(driver) {
        return Ok(());
    }
    let unbound = fs::write(device.join("driver/unbind"), name);
    unbound.map_err(|source| VduseError::Bind { name: name.into(), driver, source })
}

/// Returns the name of the driver that the device `name` is bound to.
pub(super) fn bound_driver(name: &str) -> Option<String> {
    let driver = fs::read_link(device_path(name).join("driver")).ok()?;
    Some(driver.file_name()?.to_string_lossy().into_owned())
}

/// Returns the names of the devices on the bus.
pub(super) fn devices() -> Vec<String> {
    names(&Path::new(BUS).join("devices"))
}

/// Returns the paths and names by which the driver of the device `name` offers it: `/dev/vda`, `/dev/vhost-vdpa-0`, or a
/// network interface.
pub(super) fn offered_as(name: &str) -> Vec<String> {
    let path = |disk: PathBuf| disk.file_name().map(|disk| format!("/dev/{}", disk.display()));
    let mut found: Vec<_> = disks(name).into_iter().filter_map(path).collect();
    for child in names(&device_path(name)) {
        if child.starts_with("vhost-vdpa-") {
            found.push(format!("/dev/{child}"));
        }
        let child = device_path(name).join(child);
        found.extend(names(&child.join("net")).into_iter().map(|interface| format!("interface {interface}")));
    }
    found
}

/// Returns true if the device `name` was added to the bus.
pub(super) fn is_on_bus(name: &str) -> bool {
    device_path(name).exists()
}

/// Returns true if the device `name` is a disk of this host.
pub(super) fn is_disk(name: &str) -> bool {
    !disks(name).is_empty()
}

/// Returns the number of requests that the disk of the device `name` waits for, 0 if it is no disk.
pub(super) fn requests_in_flight(name: &str) -> u64 {
    let numbers = |disk: PathBuf| fs::read_to_string(disk.join("inflight")).unwrap_or_default();
    let count = |text: String| text.split_whitespace().filter_map(|number| number.parse::<u64>().ok()).sum::<u64>();
    disks(name).into_iter().map(numbers).map(count).sum()
}

/// Returns the folders in sysfs of the disks that a device is.
fn disks(name: &str) -> Vec<PathBuf> {
    let device = device_path(name);
    let blocks = names(&device).into_iter().map(|child| device.join(child).join("block"));
    blocks.flat_map(|block| names(&block).into_iter().map(move |disk| block.join(disk))).collect()
}

fn device_path(name: &str) -> PathBuf {
    Path::new(BUS).join("devices").join(name)
}

/// Returns the names of the entries of a folder; none if it does not exist.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
