//! Internals for this project's command, tests, benchmarks and fuzz targets, by the module that they are part of.
//!
//! Any version may change or remove them.

pub use crate::sys::with_causes::with_causes;

/// The vhost-user session without its socket, and the workers of its rings.
#[cfg(feature = "backend")]
pub mod backend {
    pub use crate::backend::rings::Workers;
    pub use crate::backend::session::{
        Kick, Logging, MAX_FDS, MessageOutcome, Notifier, Session, VhostUserMessage, VhostUserReply, VringConfig,
        VringController,
    };
}

/// The errors of the kernel's vhost devices.
#[cfg(feature = "frontend")]
pub mod frontend {
    pub use crate::frontend::kernel::vhost_error;
}

/// The saved state of the built-in guest.
#[cfg(feature = "guest")]
pub mod guest {
    #[cfg(feature = "migrate")]
    pub use crate::guest::migration::{decode_guest_state, decode_saved_disks};
    pub use crate::guest::state::*;
}

/// The content of the migration stream.
///
/// # Example
///
/// Send all pages of a guest through a pair of sockets, and restore them:
///
/// ```
/// # use std::sync::Arc;
/// # use vhost_migrate::memory::{GuestAddress, Memory, Region};
/// # fn guest_memory() -> Result<Memory, Box<dyn std::error::Error>> {
/// #     Ok(Memory::new([Arc::new(Region::create(GuestAddress(0), 1 << 20)?)])?)
/// # }
/// use std::os::unix::net::UnixStream;
///
/// use vhost_migrate::stream::{Codec, MigrationId, PageStats};
/// use vhost_migrate::unstable::stream::CopyingReader;
/// use vhost_migrate::unstable::stream::frame::{ChannelId, FrameReader, FrameWriter};
/// use vhost_migrate::unstable::stream::pages::{IncomingMemory, PageDecoder, PageEncoder};
///
/// let (source, destination) = (guest_memory()?, guest_memory()?);
/// source.write(GuestAddress(0x5000), b"contents")?;
/// let (ours, theirs) = UnixStream::pair()?;
/// let id = ChannelId { migration: MigrationId::random()?, channel: 0 };
///
/// let mut writer = FrameWriter::new(ours, id);
/// let sent = PageEncoder::new(Codec::None)?.send(&source, [(0..256).into()], &mut writer)?;
/// assert_eq!((sent.data_pages, sent.zero_pages), (1, 255));
///
/// let mut reader = FrameReader::new(CopyingReader(theirs), id);
/// let mut decoder = PageDecoder::new(Arc::new(IncomingMemory::zeroed(destination.clone())), 0, 1)?;
/// let mut received = PageStats::default();
/// while received.pages() < sent.pages() {
///     let header = reader.next_frame()?;
///     received += decoder.receive(&header, &mut reader)?;
/// }
/// let mut contents = [0; 8];
/// destination.read(GuestAddress(0x5000), &mut contents)?;
/// assert_eq!(&contents, b"contents");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[cfg(feature = "migrate")]
pub mod stream {
    pub use crate::stream::sys::{CopyingReader, ReadMemory, ReceiveWindow};

    /// The connection header, and frames.
    pub mod frame {
        pub use crate::stream::frame::*;
    }
    /// Hashes of guest memory.
    pub mod hashes {
        pub use crate::stream::hashes::*;
    }
    /// Pages in batches.
    pub mod pages {
        pub use crate::stream::pages::*;
    }
    /// Everything that is not a page.
    pub mod record {
        pub use crate::stream::record::*;
    }
}
