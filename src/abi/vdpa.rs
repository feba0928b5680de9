//! The kernel's generic netlink family "vdpa" (`linux/vdpa.h`), which manages the devices on the vDPA bus.
//!
//! Names are those of the header. Here are only the numbers that this crate uses.

/// Name of the family.
pub const VDPA_GENL_NAME: &str = "vdpa";
/// Version of the family.
pub const VDPA_GENL_VERSION: u8 = 1;

/// Adds a device to the bus: [`VDPA_ATTR_MGMTDEV_DEV_NAME`] and [`VDPA_ATTR_DEV_NAME`].
pub const VDPA_CMD_DEV_NEW: u8 = 3;
/// Removes a device from the bus: [`VDPA_ATTR_DEV_NAME`].
pub const VDPA_CMD_DEV_DEL: u8 = 4;

/// Name of a management device, such as "vduse": a string.
pub const VDPA_ATTR_MGMTDEV_DEV_NAME: u16 = 2;
/// Name of a device: a string.
pub const VDPA_ATTR_DEV_NAME: u16 = 4;
