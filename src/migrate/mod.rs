//! Live migration of a guest: source, destination and the decision when to stop the guest.
//!
//! | file | purpose |
//! |---|---|
//! | `vm` | the traits that the owner of a guest implements |
//! | `source` | rounds, switchover, and the way back when something fails |
//! | `destination` | pages into place, restore, start |
//! | `populate` | the destination's memory, provided ahead |
//! | `listener` | listening for guests and for sources that ask |
//! | `outcomes` | what a destination answers to a source that asks what came of a migration |
//! | `converge` | when to stop the guest: a pure decision |
//! | `report` | events and figures |
//!
//! Migration is independent of the kind of guest and device: implement [`SourceVm`] and [`IncomingVm`], open a
//! [`StreamConnection`](crate::stream::StreamConnection), and call [`migrate`] and [`receive`].
//!
//! # Example
//!
//! Move a guest that is nothing but its memory. `examples/migrate_vm.rs` moves one with a CPU between two processes.
//!
//! ```
//! # use std::sync::Arc;
//! # use vhost_migrate::memory::{GuestAddress, Memory, Region};
//! # fn guest_memory() -> Result<Memory, VmError> {
//! #     Ok(Memory::new([Arc::new(Region::create(GuestAddress(0), 1 << 20)?)])?)
//! # }
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("incoming");
//! use std::thread;
//!
//! use vhost_migrate::dirty::{DirtySource, Log, LogSource};
//! use vhost_migrate::migrate::{
//!     IncomingVm, MigrationParameters, Outcomes, RegionLayout, SWITCHOVER_TIMEOUT, SourceVm, VmError, migrate, receive,
//! };
//! use vhost_migrate::stream::{CancelToken, StreamListener, StreamOptions, Uri, connect};
//!
//! struct Vm(Option<Memory>);
//!
//! impl SourceVm for Vm {
//!     fn memory(&self) -> Memory {
//!         self.0.clone().unwrap_or_default()
//!     }
//!     fn dirty_source(&mut self) -> Result<Box<dyn DirtySource>, VmError> {
//!         Ok(Box::new(LogSource::new("nothing", Arc::new(Log::create(self.memory().end())?.0))))
//!     }
//!     fn pause(&mut self) -> Result<(), VmError> {
//!         Ok(())
//!     }
//!     fn state(&mut self) -> Result<Vec<u8>, VmError> {
//!         Ok(b"registers".into())
//!     }
//!     fn resume(&mut self) -> Result<(), VmError> {
//!         Ok(())
//!     }
//!     fn release(&mut self) {
//!         self.0 = None;
//!     }
//! }
//!
//! impl IncomingVm for Vm {
//!     fn prepare(&mut self, _regions: &[RegionLayout]) -> Result<Memory, VmError> {
//!         let memory = guest_memory()?;
//!         self.0 = Some(memory.clone());
//!         Ok(memory)
//!     }
//!     fn restore(&mut self, state: &[u8]) -> Result<(), VmError> {
//!         if state == b"registers" { Ok(()) } else { Err("the state of another guest".into()) }
//!     }
//!     fn start(&mut self, _run: bool, _cancel: &CancelToken) -> Result<Option<u64>, VmError> {
//!         Ok(None)
//!     }
//! }
//!
//! let uri = Uri::Unix(path);
//! let listener = StreamListener::bind(&uri)?;
//! let destination = thread::spawn(move || -> Result<Vm, VmError> {
//!     let connection = listener.accept(&StreamOptions::new()?)?;
//!     let mut vm = Vm(None);
//!     receive(&mut vm, connection, &Outcomes::default(), SWITCHOVER_TIMEOUT)?;
//!     Ok(vm)
//! });
//!
//! let mut source = Vm(Some(guest_memory()?));
//! source.memory().write(GuestAddress(0x5000), b"contents")?;
//! let parameters = MigrationParameters::default().with_verify(true);
//! let connection = connect(&uri, &StreamOptions::new()?)?;
//! let report = migrate(&mut source, connection, &parameters, &mut |_| {})?;
//! assert_eq!(report.guest_bytes, 1 << 20);
//!
//! let mut contents = [0; 8];
//! let arrived = destination.join().map_err(|_| "the destination panicked")??;
//! arrived.memory().read(GuestAddress(0x5000), &mut contents)?;
//! assert_eq!(&contents, b"contents");
//! # Ok::<(), VmError>(())
//! ```
//!
//! # Cancel a migration
//!
//! Any thread can cancel a migration by the token of its connection: at the source until the commit is sent, at the
//! destination until READY is sent. The guest then runs at the source as before:
//!
//! ```
//! # use std::sync::Arc;
//! # use vhost_migrate::dirty::{DirtySource, Log, LogSource};
//! # use vhost_migrate::memory::{GuestAddress, Memory, Region};
//! # use vhost_migrate::migrate::{SourceVm, VmError};
//! # use vhost_migrate::stream::{StreamListener, StreamOptions, Uri, connect};
//! # struct Vm(Memory);
//! # impl SourceVm for Vm {
//! #     fn memory(&self) -> Memory { self.0.clone() }
//! #     fn dirty_source(&mut self) -> Result<Box<dyn DirtySource>, VmError> {
//! #         Ok(Box::new(LogSource::new("nothing", Arc::new(Log::create(self.0.end())?.0))))
//! #     }
//! #     fn pause(&mut self) -> Result<(), VmError> { Ok(()) }
//! #     fn state(&mut self) -> Result<Vec<u8>, VmError> { Ok(Vec::new()) }
//! #     fn resume(&mut self) -> Result<(), VmError> { Ok(()) }
//! #     fn release(&mut self) {}
//! # }
//! # let folder = tempfile::tempdir()?;
//! # let uri = Uri::Unix(folder.path().join("incoming"));
//! # let listener = StreamListener::bind(&uri)?;
//! # let _destination = std::thread::spawn(move || listener.accept(&StreamOptions::new().unwrap()));
//! # let connection = connect(&uri, &StreamOptions::new()?)?;
//! # let mut vm = Vm(Memory::new([Arc::new(Region::create(GuestAddress(0), 1 << 20)?)])?);
//! use std::{thread, time::Duration};
//!
//! use vhost_migrate::migrate::{GuestLocation, MigrationParameters, migrate};
//!
//! // This destination accepts the connection and then does nothing.
//! let token = connection.cancel_token().clone();
//! let timer = thread::spawn(move || {
//!     thread::sleep(Duration::from_millis(100));
//!     token.cancel()
//! });
//! let failure = migrate(&mut vm, connection, &MigrationParameters::default(), &mut |_| {}).unwrap_err();
//! assert_eq!(failure.location, GuestLocation::RunningHere);
//! # timer.join().map_err(|_| "the timer panicked")?;
//! # Ok::<(), VmError>(())
//! ```
//!
//! A token stays cancelled, so another attempt needs new [`StreamOptions`](crate::stream::StreamOptions).
#![forbid(unsafe_code)]

mod converge;
mod destination;
mod error;
mod listener;
mod outcomes;
mod populate;
mod report;
mod source;
mod time_limit;
mod vm;

pub use converge::{Convergence, ConvergencePolicy, NextStep, RoundResult, RoundTime, STALL_ROUNDS};
pub use destination::{IncomingReport, SWITCHOVER_TIMEOUT, receive};
pub use error::{MigrateError, MigrationFailure};
pub use listener::MigrationListener;
pub use outcomes::Outcomes;
pub use report::{GuestLocation, MigrationEvent, MigrationReport, RoundReport};
pub use source::{MigrationParameters, OUTCOME_QUERY_TIMEOUT, migrate};
pub use vm::{IncomingVm, RegionLayout, SourceVm, VmError};
