//! The errors of the kernel's vhost ioctls: name of the call, cause and remedy (rules K2).
#![forbid(unsafe_code)]

use std::io;
use std::path::Path;

use nix::errno::Errno;

use super::super::FrontendError;
use crate::abi::vhost::*;

/// Makes the error of a call that the device refused.
pub fn vhost_error(device: &str, request: u32, errno: Errno) -> FrontendError {
    vhost_error_with(device, name(request), reason(request, errno), errno)
}

fn vhost_error_with(device: &str, call: &'static str, reason: &'static str, errno: Errno) -> FrontendError {
    FrontendError::Vhost { device: device.into(), call, reason, source: io::Error::from(errno) }
}

/// Makes the error of an IOTLB message (`VHOST_IOTLB_*`) that the device refused.
pub(super) fn message_error(device: &str, kind: u8, errno: Errno) -> FrontendError {
    let call = match kind {
        VHOST_IOTLB_UPDATE => "VHOST_IOTLB_UPDATE",
        VHOST_IOTLB_INVALIDATE => "VHOST_IOTLB_INVALIDATE",
        VHOST_IOTLB_BATCH_BEGIN => "VHOST_IOTLB_BATCH_BEGIN",
        VHOST_IOTLB_BATCH_END => "VHOST_IOTLB_BATCH_END",
        _ => "an unknown message",
    };
    let reason = match errno {
        Errno::EINVAL => "the device cannot access these addresses. Place guest memory inside its range (rule K5.3)",
        Errno::EEXIST => "the addresses are mapped already. Unmap them first (rule K5.3)",
        Errno::ENOMEM => {
            "guest memory cannot be locked. Raise RLIMIT_MEMLOCK (ulimit -l, in KiB) to its size (rule K5.4)"
        }
        Errno::EFAULT => "the region is outside this process's memory",
        _ => return vhost_error_with(device, call, reason(0, errno), errno),
    };
    vhost_error_with(device, call, reason, errno)
}

/// Makes the error of a device that cannot be opened. `module` is the kernel module that makes it.
pub(super) fn open_error(path: &Path, module: &str, source: io::Error) -> FrontendError {
    let errno = source.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw);
    let advice = match errno {
        Errno::ENOENT | Errno::ENXIO | Errno::ENODEV if module == "vhost_vdpa" => {
            "does the device exist? Run `modprobe vhost_vdpa`, and bind it to that driver, in \
             /sys/bus/vdpa/drivers/vhost_vdpa"
                .into()
        }
        Errno::ENOENT | Errno::ENXIO | Errno::ENODEV => format!("is the module loaded? Run `modprobe {module}`"),
        Errno::EACCES | Errno::EPERM if matches!(module, "vhost_net" | "vhost_vsock") => {
            "add this user to the group kvm, which systemd gives access to it, or run as root".into()
        }
        Errno::EACCES | Errno::EPERM => "run as root, or let a udev rule give this user's group access to it".into(),
        Errno::EBUSY => "another process has it open: end that, or use another device".into(),
        Errno::EIO | Errno::ETIMEDOUT if module == "vhost_vdpa" => {
            "the device does not reply: is the process that implements it alive?".into()
        }
        Errno::EMFILE | Errno::ENFILE => "raise the limit of open files (ulimit -n)".into(),
        Errno::ENOMEM => "the kernel has no memory left for it".into(),
        _ => "the log of the kernel may have the reason".into(),
    };
    FrontendError::OpenDevice { path: path.into(), advice, source }
}

/// Names of requests, as the kernel's headers have them.
macro_rules! names {
    ($($name:ident,)*) => {
        /// Returns the name of a request.
        fn name(request: u32) -> &'static str {
            match request {
                $($name => stringify!($name),)*
                _ => "an unknown request",
            }
        }
    };
}

names! {
    VHOST_GET_FEATURES, VHOST_SET_FEATURES, VHOST_SET_OWNER, VHOST_SET_MEM_TABLE, VHOST_SET_LOG_BASE,
    VHOST_SET_LOG_FD, VHOST_SET_VRING_NUM, VHOST_SET_VRING_ADDR, VHOST_SET_VRING_BASE, VHOST_GET_VRING_BASE,
    VHOST_SET_VRING_ENDIAN, VHOST_SET_VRING_KICK, VHOST_SET_VRING_CALL, VHOST_SET_VRING_ERR,
    VHOST_SET_VRING_BUSYLOOP_TIMEOUT, VHOST_SET_BACKEND_FEATURES, VHOST_GET_BACKEND_FEATURES, VHOST_NET_SET_BACKEND,
    VHOST_SCSI_SET_ENDPOINT, VHOST_SCSI_CLEAR_ENDPOINT, VHOST_SCSI_GET_ABI_VERSION, VHOST_SCSI_SET_EVENTS_MISSED,
    VHOST_SCSI_GET_EVENTS_MISSED, VHOST_VSOCK_SET_GUEST_CID, VHOST_VSOCK_SET_RUNNING, VHOST_NEW_WORKER,
    VHOST_FREE_WORKER, VHOST_ATTACH_VRING_WORKER, VHOST_SET_FORK_FROM_OWNER, VHOST_VDPA_GET_DEVICE_ID,
    VHOST_VDPA_GET_STATUS, VHOST_VDPA_SET_STATUS, VHOST_VDPA_GET_CONFIG, VHOST_VDPA_SET_CONFIG,
    VHOST_VDPA_SET_VRING_ENABLE, VHOST_VDPA_GET_VRING_NUM, VHOST_VDPA_SET_CONFIG_CALL, VHOST_VDPA_GET_IOVA_RANGE,
    VHOST_VDPA_GET_CONFIG_SIZE, VHOST_VDPA_GET_VQS_COUNT, VHOST_VDPA_SUSPEND,
}

/// Returns cause and remedy of an error.
fn reason(request: u32, errno: Errno) -> &'static str {
    match (request, errno) {
        (VHOST_SET_OWNER, Errno::EBUSY) => "the device has an owner. Open it anew for each front-end (rule K2.2)",
        (VHOST_SET_OWNER, Errno::EAGAIN | Errno::ENOMEM) => {
            "the kernel cannot make the device's thread. Raise the limits of processes and memory"
        }
        (VHOST_SET_MEM_TABLE, Errno::E2BIG) => {
            "the table has more regions than the parameter max_mem_regions of the module vhost. Use fewer, larger \
             regions (rule K2.8)"
        }
        (VHOST_SET_MEM_TABLE, Errno::EFAULT) => {
            "a region is outside this process's memory, or the dirty log does not cover it. Grow the log first (rule \
             K1.4)"
        }
        (VHOST_SET_LOG_BASE, Errno::EFAULT) => {
            "the log is outside this process's memory. Map it before it is set (rule K2.4)"
        }
        (VHOST_SET_LOG_FD, Errno::EBADF) => "the descriptor is not open. Keep it open until the call (rule K2.5)",
        (VHOST_SET_LOG_FD, Errno::EINVAL) => "the descriptor is not an eventfd. Pass one (rule K2.5)",
        (VHOST_SET_VRING_KICK | VHOST_SET_VRING_CALL | VHOST_SET_VRING_ERR, Errno::EBADF | Errno::EINVAL) => {
            "the descriptor is not an eventfd. Pass one (rule K2.5)"
        }
        (VHOST_SET_FEATURES, Errno::EOPNOTSUPP) => {
            "the device does not offer all of these features. Acknowledge only those of features() (rule K2.6)"
        }
        (VHOST_SET_FEATURES, Errno::EFAULT) => {
            "the dirty log does not cover guest memory, or is not mapped. Set a log first (rule K1.3)"
        }
        (VHOST_SET_FEATURES, Errno::EBUSY) => {
            "the device runs, and changes no features but LOG_ALL. Stop its rings first (rule K2.3)"
        }
        (VHOST_SET_VRING_ADDR, Errno::EOPNOTSUPP) => "the ring's flags are unknown to this kernel (rule K2.6)",
        (VHOST_SET_VRING_ADDR, Errno::EINVAL | Errno::EFAULT) => {
            "an area of the ring is not aligned (descriptors by 16 bytes, the avail ring by 2, the used ring by 4), or is \
             outside this process's memory. Put each inside one region (rules K2.4, K2.7)"
        }
        (VHOST_SET_VRING_NUM, Errno::EINVAL) => "the size is not a power of two up to 32768 (rule K2.7)",
        (VHOST_SET_VRING_BASE, Errno::EINVAL) => "the base of a split ring is above 65535 (rule K2.7)",
        (VHOST_SET_VRING_NUM | VHOST_SET_VRING_BASE | VHOST_SET_VRING_ENDIAN, Errno::EBUSY) => {
            "the ring runs. Stop it first (rule K2.3)"
        }
        (VHOST_SET_VRING_ENDIAN, Errno::ENOTTY) => {
            "this kernel serves rings in the host's byte order. Build it with CONFIG_VHOST_CROSS_ENDIAN_LEGACY (rule \
             K2.10)"
        }
        (VHOST_NET_SET_BACKEND, Errno::ENOTSOCK) => "the descriptor is neither a tap nor a packet socket. Open a tap",
        (VHOST_NET_SET_BACKEND, Errno::EBADF | Errno::EBADFD) => {
            "the tap is not open, or its interface was removed. Open it again"
        }
        (VHOST_NET_SET_BACKEND | VHOST_VSOCK_SET_RUNNING | VHOST_SCSI_SET_ENDPOINT, Errno::EFAULT) => {
            "a ring or the dirty log is outside this process's memory. Set memory, rings and log before rings start \
             (rule K2.4)"
        }
        (VHOST_VSOCK_SET_GUEST_CID, Errno::EADDRINUSE) => "another guest has this context id. Use another one",
        (VHOST_VSOCK_SET_GUEST_CID, Errno::EINVAL) => "a guest's context id is from 3 to 4294967294. Use one of these",
        (VHOST_SCSI_SET_ENDPOINT, Errno::EEXIST | Errno::ENODEV | Errno::ENOENT) => {
            "there is no target of this name with a nexus, or another device uses it. Set it up in \
             /sys/kernel/config/target/vhost"
        }
        (VHOST_SCSI_SET_ENDPOINT, Errno::ENOMEM) => "the kernel has no memory for the requests. Use smaller rings",
        (VHOST_NEW_WORKER | VHOST_ATTACH_VRING_WORKER, Errno::ENOTTY) => {
            "this device has one worker. Omit the option, or use vhost-scsi of Linux 6.5 or later (rule K2.10)"
        }
        (VHOST_SET_FORK_FROM_OWNER, Errno::ENOTTY) => {
            "this kernel does not let the owner choose the type of workers. Omit the option, or use a kernel with \
             CONFIG_VHOST_ENABLE_FORK_OWNER_CONTROL (rule K2.10)"
        }
        (VHOST_SET_FORK_FROM_OWNER, Errno::EBUSY) => "the device has an owner. Set it before (rule K2.2)",
        (_, Errno::ENOBUFS) => "the device has no ring of this index. Use a lower one (rule K2.9)",
        (_, Errno::EPERM) => {
            "this process does not own the device. Make the call in the process that opened it (rule K2.1)"
        }
        (_, Errno::ENOTTY) => "neither this kernel nor this device has it. Use a later kernel (rule K2.10)",
        (_, Errno::ENOMEM) => "the kernel has no memory left. Free some, or raise the limits of this process",
        (_, Errno::EIO) => "the device does not reply. Is the process that implements it alive?",
        _ => "the kernel refused it. The log of the kernel may have the reason",
    }
}
