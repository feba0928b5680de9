//! vhost-scsi: a target of the kernel.
#![forbid(unsafe_code)]

use nix::sys::utsname::uname;
use zerocopy::FromZeros;

use super::super::FrontendError;
use super::handle::VhostHandle;
use super::{Kind, LogQuality};
use crate::abi::vhost::{
    ScsiTarget, VHOST_SCSI_ABI_VERSION, VHOST_SCSI_CLEAR_ENDPOINT, VHOST_SCSI_GET_ABI_VERSION, VHOST_SCSI_SET_ENDPOINT,
};
use crate::abi::virtio::{VIRTIO_ID_SCSI, VirtioFeatures};

/// First kernel whose vhost-scsi logs the data that it writes (rule K4.3).
const LOGS_SINCE: (u32, u32) = (6, 16);

/// A vhost-scsi device: control ring, event ring and request rings.
pub(super) struct Scsi {
    target: ScsiTarget,
    queues: u16,
}

impl Scsi {
    /// A device with `queues` rings in all, for the target of this name.
    pub(super) fn new(wwpn: &str, queues: u16) -> Result<Scsi, FrontendError> {
        let mut target = ScsiTarget::new_zeroed();
        target.abi_version = VHOST_SCSI_ABI_VERSION;
        // The last byte stays 0, as the terminator.
        match target.vhost_wwpn.split_last_mut().and_then(|(_, space)| space.get_mut(..wwpn.len())) {
            Some(space) if !wwpn.is_empty() && !wwpn.contains('\0') => space.copy_from_slice(wwpn.as_bytes()),
            _ => {
                return Err(FrontendError::NotOffered {
                    what: format!("a target of the name {wwpn:?}"),
                    advice: "the name has 1 to 223 bytes, for example naa.5001405000000001",
                });
            }
        }
        Ok(Scsi { target, queues })
    }
}

impl Kind for Scsi {
    fn id(&self) -> u32 {
        VIRTIO_ID_SCSI
    }

    fn opened(&mut self, handle: &mut VhostHandle) -> Result<(), FrontendError> {
        let version: i32 = handle.get(VHOST_SCSI_GET_ABI_VERSION)?;
        if version < VHOST_SCSI_ABI_VERSION {
            return Err(FrontendError::NotOffered {
                what: format!("version {VHOST_SCSI_ABI_VERSION} of its interface (it has {version})"),
                advice: "use Linux 3.6 or later",
            });
        }
        Ok(())
    }

    fn queues(&self) -> u16 {
        self.queues
    }

    fn runs_as_a_whole(&self) -> bool {
        true
    }

    fn run(&self, handle: &mut VhostHandle, _: u16, _: VirtioFeatures) -> Result<(), FrontendError> {
        handle.set(VHOST_SCSI_SET_ENDPOINT, self.target)
    }

    fn halt(&self, handle: &mut VhostHandle, _: u16) -> Result<(), FrontendError> {
        handle.set(VHOST_SCSI_CLEAR_ENDPOINT, self.target)
    }

    fn log_quality(&self) -> Result<LogQuality, &'static str> {
        log_quality()
    }
}

/// Returns the quality of the log, or the reason why there is none (rules K4).
pub(super) fn log_quality() -> Result<LogQuality, &'static str> {
    let release = uname().ok().and_then(|uname| version(uname.release().to_str()?));
    match release.is_some_and(|release| release >= LOGS_SINCE) {
        true => Ok(LogQuality::Conservative),
        false => Err("before Linux 6.16 the kernel does not log what vhost-scsi writes to guest memory, although \
                      it offers LOG_ALL (rule K4.3); use a later kernel, or wrap it in shadow::ShadowDevice"),
    }
}

/// Returns the first two numbers of a kernel release such as `6.12.117+deb12-cloud-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rule K4.3.
    #[test]
    fn the_version_of_a_kernel_is_compared_by_numbers() {
        for (release, logs) in [
            ("6.12.117+deb12-cloud-amd64", false),
            ("6.9.0", false),
            ("6.16.0-rc1", true),
            ("7.3-cloud", true),
            ("6", false),
            ("", false),
        ] {
            assert_eq!(version(release).is_some_and(|version| version >= LOGS_SINCE), logs, "{release}");
        }
    }

    #[test]
    fn a_name_that_no_target_can_have_is_refused() {
        for name in ["", "naa\0", &"n".repeat(224)] {
            assert!(Scsi::new(name, 3).is_err(), "{name:?}");
        }
        let longest = "n".repeat(223);
        assert_eq!(Scsi::new(&longest, 3).unwrap().target.vhost_wwpn[..223], *longest.as_bytes());
    }
}
