//! Disks of a guest that is saved, and restored while they may have gone on without it (GET_DISK_GENERATION), or that moves
//! (GET_DISK_IDENTITY).

use super::{AttachedDisk, DiskGenerations, DiskIdentities, Guest, GuestError, in_parallel};
use crate::abi::vhost_user::DiskGeneration;

/// Remedies for a disk that is not what it was.
const ADVICE: &str = "Restore the guest onto its disk as it was, or a copy that was made then with its extended attributes \
                      (cp --preserve=xattr). With --ignore-disk-generation it is restored all the same, and reads what it \
                      did not write";

impl Guest {
    /// The generations of its disks. Its devices must be stopped.
    ///
    /// # Errors
    /// If a device can't be asked.
    pub fn disk_generations(&self) -> Result<DiskGenerations, GuestError> {
        in_parallel(&self.disks, |attached| Ok(attached.disk.try_with(|device| device.disk_generation())?))
    }

    /// The identities of its disks, also while it runs.
    ///
    /// # Errors
    /// If a device can't be asked.
    pub fn disk_identities(&self) -> Result<DiskIdentities, GuestError> {
        in_parallel(&self.disks, |attached| Ok(attached.disk.retry_until_connected(|device| device.disk_identity())?))
    }

    /// The disks that can't be told in `generations`.
    pub fn unknown_disks(&self, generations: &[Option<DiskGeneration>]) -> Vec<String> {
        let disks = self.disks.iter().zip(generations);
        disks.filter(|(_, generation)| generation.is_none()).map(|(attached, _)| attached.disk.name.clone()).collect()
    }

    /// Compares the disks with what they were when the guest was saved, before it runs. Those that could not be told then are
    /// not compared.
    ///
    /// # Errors
    /// [`GuestError::State`] for the first that has gone on, is another, or can't be told any more.
    pub fn compare_disks(&self, saved: &[Option<DiskGeneration>]) -> Result<(), GuestError> {
        let found = self.disk_generations()?;
        for ((AttachedDisk { disk, .. }, now), then) in self.disks.iter().zip(&found).zip(saved) {
            let Some(then) = then else { continue };
            let difference = match now {
                None => {
                    "nothing tells whether it holds what it held when the guest was saved: its back-end, or the image's \
                         file system, knows no generations"
                }
                Some(now) if now.identity != then.identity => {
                    "it is another disk than the one that the guest was saved with, or a copy without its attributes"
                }
                Some(now) if now.generation != then.generation => {
                    "it has gone on since the guest was saved: what it holds has been written to"
                }
                Some(_) => continue,
            };
            return Err(GuestError::State(format!("{}: {difference}. {ADVICE}", disk.name)));
        }
        Ok(())
    }
}
