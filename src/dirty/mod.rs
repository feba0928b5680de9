//! Tracking of written guest memory: the shared dirty log, its harvest, page sets, and other sources of dirty pages.
//!
//! Here: the log that front-ends and back-ends share ([`Log`]), the sets of pages that a harvest yields
//! ([`PageSet`]) and the interface through which a migration gets dirty pages ([`DirtySource`]).
//! Not here: the protocol that installs a log (`backend`, `frontend`), and the transfer of pages (`stream`).
//!
//! # Example
//!
//! Mark pages in a log, and harvest them:
//!
//! ```
//! use vhost_migrate::dirty::{Log, PageSet};
//! use vhost_migrate::memory::{GuestAddress, PageNumber};
//!
//! // The front-end makes a log for 1 GiB and sends its fd to the back-end.
//! let (log, _fd) = Log::create(GuestAddress(1 << 30))?;
//!
//! // The back-end has written 16 bytes, which are on two pages.
//! let gpa = GuestAddress(0x1ff8);
//! log.mark(gpa, 16);
//!
//! let mut pages = PageSet::default();
//! assert_eq!(log.harvest(&mut pages).added, 2);
//! assert!(pages.iter().eq([PageNumber(1), PageNumber(2)]));
//!
//! // The harvest has cleared the marks.
//! assert!(!log.is_marked(gpa));
//! # Ok::<(), vhost_migrate::dirty::DirtyError>(())
//! ```

#[cfg(feature = "vm-memory-bitmap")]
mod bitmap;
mod error;
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
pub use error::DirtyError;
pub use harvest::Harvest;
pub use log::{Burst, Log, LogSignal};
pub use measure::measure_dirty_rate;
pub use page_set::{PageSet, Runs};
pub use pagemap::Pagemap;
pub use rate::{DirtyModel, DirtyRate, Forecast, RateMeter, SourceRate, forecast};
#[cfg(feature = "vhost-user-backend")]
pub use region_bitmap::{DeviceLog, LogMemory, RegionBitmap, RegionSlice};
pub use source::{DirtySource, LogQuality, LogSource, SourceShare, UnionSource};
