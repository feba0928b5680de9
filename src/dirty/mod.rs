//! Tracking of written guest memory: the shared dirty log, its harvest, page sets, and other sources of dirty pages.
//!
//! Here: the log that front-ends and back-ends share ([`Log`]), the sets of pages that a harvest yields
//! ([`PageSet`]) and the interface through which a migration gets dirty pages ([`DirtySource`]).
//! Not here: the protocol that installs a log (`backend`, `frontend`), and the transfer of pages (`stream`).

#[cfg(feature = "vm-memory-bitmap")]
mod bitmap;
mod harvest;
mod log;
mod measure;
mod page_set;
mod pagemap;
mod rate;
#[cfg(feature = "vhost-user-backend")]
mod region_bitmap;
mod source;
mod vector;

#[cfg(feature = "vm-memory-bitmap")]
pub use bitmap::{LogBitmap, LogSlice, LogSwitch, PageMarker};
pub use harvest::Harvest;
pub use log::{Burst, Log, LogError, LogSignal};
pub use measure::measure_dirty_rate;
pub use page_set::{PageSet, Runs};
pub use pagemap::{Pagemap, PagemapError};
pub use rate::{DirtyModel, DirtyRate, Forecast, RateMeter, SourceRate, forecast};
#[cfg(feature = "vhost-user-backend")]
pub use region_bitmap::{DeviceLog, LogMemory, RegionBitmap, RegionSlice};
pub use source::{DirtyError, DirtySource, LogSource, SourceShare, UnionSource};
