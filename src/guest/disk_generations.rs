//! Identities and generations of the guest's disks: for saved guests (GET_DISK_GENERATION), whose disks may have
//! changed at the restore, and for live migrations (GET_DISK_IDENTITY).

use super::{AttachedDisk, DiskGenerations, DiskIdentities, Guest, GuestError, in_parallel};
use crate::abi::vhost_user::DiskGeneration;

/// Advice for a disk that has changed since the save.
const ADVICE: &str = "Restore the guest onto its disk as it was, or a copy that was made then with its extended attributes \
                      (cp --preserve=xattr). With --ignore-disk-generation it is restored all the same, and reads what it \
                      did not write";

impl Guest {
    /// Returns the generations of the disks. The devices must be stopped.
    ///
    /// # Errors
    /// If a device cannot be queried.
    pub fn disk_generations(&self) -> Result<DiskGenerations, GuestError> {
        in_parallel(&self.disks, |attached| Ok(attached.disk.try_with(|device| device.disk_generation())?))
    }

    /// Returns the identities of the disks, also while the guest runs.
    ///
    /// # Errors
    /// If a device can't be asked.
    pub fn disk_identities(&self) -> Result<DiskIdentities, GuestError> {
        in_parallel(&self.disks, |attached| Ok(attached.disk.retry_until_connected(|device| device.disk_identity())?))
    }

    /// Returns the names of the disks without a generation in `generations`.
    pub fn unknown_disks(&self, generations: &[Option<DiskGeneration>]) -> Vec<String> {
        let disks = self.disks.iter().zip(generations);
        disks.filter(|(_, generation)| generation.is_none()).map(|(attached, _)| attached.disk.name.clone()).collect()
    }

    /// Compares the disks with their generations at the save, before the guest runs. Disks without a saved generation
    /// are not compared.
    ///
    /// # Errors
    /// [`GuestError::State`] for the first disk that has changed, is another disk, or has no generation now.
    pub fn compare_disks(&self, saved: &[Option<DiskGeneration>]) -> Result<(), GuestError> {
        let found = self.disk_generations()?;
        for ((AttachedDisk { disk, .. }, now), then) in self.disks.iter().zip(&found).zip(saved) {
            let Some(then) = then else { continue };
            let difference = match now {
                None => {
                    "its generation is unknown, so that it can't be compared with the saved one: its back-end, or the \
                         image's file system, does not support generations"
                }
                Some(now) if now.identity != then.identity => {
                    "it is another disk than the one that the guest was saved with, or a copy without its attributes"
                }
                Some(now) if now.generation != then.generation => "it was written after the guest was saved",
                Some(_) => continue,
            };
            return Err(GuestError::State(format!("{}: {difference}. {ADVICE}", disk.name)));
        }
        Ok(())
    }
}
