//! The files of VDUSE, `/dev/vduse/control` and `/dev/vduse/NAME`, and their ioctls.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::abi::vduse::{
    ConfigDataHeader, DevConfigHeader, DevRequest, DevResponse, IotlbEntry, VDUSE_API_VERSION, VDUSE_CREATE_DEV,
    VDUSE_DESTROY_DEV, VDUSE_DEV_GET_FEATURES, VDUSE_DEV_INJECT_CONFIG_IRQ, VDUSE_DEV_SET_CONFIG, VDUSE_GET_FEATURES,
    VDUSE_IOTLB_GET_FD, VDUSE_NAME_MAX, VDUSE_SET_API_VERSION, VDUSE_SET_FEATURES, VDUSE_VQ_GET_INFO,
    VDUSE_VQ_INJECT_IRQ, VDUSE_VQ_SETUP, VDUSE_VQ_SETUP_KICKFD, VqConfig, VqEventfd, VqInfo,
};
use crate::abi::virtio::VirtioFeatures;

const CONTROL: &str = "/dev/vduse/control";

/// `/dev/vduse/control`.
#[derive(Debug)]
pub(super) struct ControlFile(File);

impl ControlFile {
    /// Opens the file and selects version 0 of the interface.
    pub(super) fn open() -> io::Result<ControlFile> {
        let file = OpenOptions::new().read(true).write(true).open(CONTROL)?;
        ioctl::<VDUSE_SET_API_VERSION, u64>(file.as_fd(), &mut { VDUSE_API_VERSION })?;
        Ok(ControlFile(file))
    }

    /// Returns the VDUSE features that the kernel offers. Kernels without this ioctl offer none.
    pub(super) fn features(&self) -> u64 {
        let mut features = 0;
        ioctl::<VDUSE_GET_FEATURES, u64>(self.0.as_fd(), &mut features).map_or(0, |_| features)
    }

    /// Acknowledges VDUSE features, for devices created from now on.
    pub(super) fn set_features(&self, mut features: u64) -> io::Result<()> {
        ioctl::<VDUSE_SET_FEATURES, u64>(self.0.as_fd(), &mut features).map(drop)
    }

    /// Creates a device with this configuration space.
    pub(super) fn create(&self, header: &DevConfigHeader, config: &[u8]) -> io::Result<()> {
        let header = DevConfigHeader { config_size: config.len() as u32, ..*header };
        let mut bytes = [header.as_bytes(), config].concat();
        // SAFETY: the kernel reads the header and the `config_size` bytes that follow it, which are the length of
        // `config`. `bytes` has both, and is alive across the call.
        unsafe { call(self.0.as_fd(), VDUSE_CREATE_DEV, bytes.as_mut_ptr().cast()) }.map(drop)
    }

    /// Destroys a device that is neither open nor on the vDPA bus.
    pub(super) fn destroy(&self, name: &str) -> io::Result<()> {
        ioctl::<VDUSE_DESTROY_DEV, [u8; VDUSE_NAME_MAX]>(self.0.as_fd(), &mut name_bytes(name)).map(drop)
    }
}

/// `/dev/vduse/NAME`, which one process can have open.
#[derive(Debug)]
pub(super) struct DeviceFile(File);

impl DeviceFile {
    /// Opens the file of a device.
    pub(super) fn open(name: &str) -> io::Result<DeviceFile> {
        let path = format!("/dev/vduse/{name}");
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        Ok(DeviceFile(file))
    }

    /// Reads a message. Returns `None` if there is none.
    pub(super) fn read(&self) -> io::Result<Option<DevRequest>> {
        let mut request = DevRequest::new_zeroed();
        match (&self.0).read(request.as_mut_bytes()) {
            Ok(count) if count == size_of::<DevRequest>() => Ok(Some(request)),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes the response to a message.
    pub(super) fn write(&self, response: &DevResponse) -> io::Result<()> {
        (&self.0).write(response.as_bytes()).map(drop)
    }

    /// Declares a ring.
    pub(super) fn set_up_ring(&self, index: u16, max_size: u16) -> io::Result<()> {
        let mut config = VqConfig { index: index.into(), max_size, ..VqConfig::new_zeroed() };
        ioctl::<VDUSE_VQ_SETUP, _>(self.as_fd(), &mut config).map(drop)
    }

    /// Returns the features that the driver has acknowledged.
    pub(super) fn features(&self) -> io::Result<VirtioFeatures> {
        let mut bits = 0;
        ioctl::<VDUSE_DEV_GET_FEATURES, u64>(self.as_fd(), &mut bits)?;
        Ok(VirtioFeatures::from_bits_retain(bits))
    }

    /// Returns true if the kernel does not use the device any more. It then refuses all calls.
    pub(super) fn is_given_up(&self) -> bool {
        self.features().is_err_and(|error| error.raw_os_error() == Some(libc::EPERM))
    }

    /// Returns the addresses and the state of a ring.
    pub(super) fn ring(&self, index: u16) -> io::Result<VqInfo> {
        let mut info = VqInfo { index: index.into(), ..VqInfo::new_zeroed() };
        ioctl::<VDUSE_VQ_GET_INFO, _>(self.as_fd(), &mut info)?;
        Ok(info)
    }

    /// Sets the kick eventfd of a ring.
    pub(super) fn set_kick(&self, index: u16, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        let mut kick = VqEventfd { index: index.into(), fd: eventfd.as_raw_fd() };
        ioctl::<VDUSE_VQ_SETUP_KICKFD, _>(self.as_fd(), &mut kick).map(drop)
    }

    /// Notifies the driver that buffers of a ring were used.
    pub(super) fn inject_irq(&self, index: u16) -> io::Result<()> {
        ioctl::<VDUSE_VQ_INJECT_IRQ, u32>(self.as_fd(), &mut u32::from(index)).map(drop)
    }

    /// Replaces the configuration space, and notifies the driver.
    pub(super) fn set_config(&self, config: &[u8]) -> io::Result<()> {
        let header = ConfigDataHeader { offset: 0, length: config.len() as u32 };
        let mut bytes = [header.as_bytes(), config].concat();
        // SAFETY: the kernel reads the header and the `length` bytes that follow it, which are the length of `config`.
        // `bytes` has both, and is alive across the call.
        unsafe { call(self.as_fd(), VDUSE_DEV_SET_CONFIG, bytes.as_mut_ptr().cast()) }?;
        // SAFETY: the request has no argument.
        unsafe { call(self.as_fd(), VDUSE_DEV_INJECT_CONFIG_IRQ, std::ptr::null_mut()) }.map(drop)
    }

    /// Returns the mapping that has the byte at `iova`, and its file.
    pub(super) fn mapping(&self, iova: u64) -> io::Result<(IotlbEntry, OwnedFd)> {
        let mut entry = IotlbEntry { start: iova, last: iova, ..IotlbEntry::new_zeroed() };
        let fd = ioctl::<VDUSE_IOTLB_GET_FD, _>(self.as_fd(), &mut entry)?;
        // SAFETY: the kernel has made this descriptor for the caller, and nothing else knows it.
        Ok((entry, unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

#[cfg(test)]
impl From<OwnedFd> for DeviceFile {
    /// Takes a socket whose peer is the kernel.
    fn from(socket: OwnedFd) -> DeviceFile {
        DeviceFile(socket.into())
    }
}

impl AsFd for DeviceFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The name of a device as the kernel takes it: followed by zeros, of which there is at least one.
pub(super) fn name_bytes(name: &str) -> [u8; VDUSE_NAME_MAX] {
    let mut bytes = [0; VDUSE_NAME_MAX];
    bytes.iter_mut().take(VDUSE_NAME_MAX - 1).zip(name.bytes()).for_each(|(to, from)| *to = from);
    bytes
}

/// Calls an ioctl whose argument is a `T`.
fn ioctl<const REQUEST: u32, T: FromBytes + IntoBytes + Immutable>(
    fd: BorrowedFd<'_>,
    argument: &mut T,
) -> io::Result<i32> {
    // Bits 16-29 of the number are the size that the kernel reads and writes.
    const { assert!((REQUEST >> 16 & 0x3fff) as usize == size_of::<T>()) };
    // SAFETY: the kernel reads and writes at most the size of the argument, as asserted, and any bytes are a valid `T`.
    unsafe { call(fd, REQUEST, std::ptr::from_mut(argument).cast()) }
}

/// Calls an ioctl.
///
/// # Safety
/// `argument` must be valid for the reads and writes of the request.
unsafe fn call(fd: BorrowedFd<'_>, request: u32, argument: *mut libc::c_void) -> io::Result<i32> {
    // SAFETY: as the caller promises. The type of the number differs between C libraries.
    Ok(Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument) })?)
}
