//! Back-ends that inject one fault: changes of requests, replies and rings.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::stat::{SFlag, fstat};
use tempfile::TempDir;
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, Header};
use vhost_migrate::backend::blk::{BlkDevice, BlkOptions};
use vhost_migrate::backend::net::{NetDevice, NetOptions, NetPeer};
use vhost_migrate::backend::{BackendError, VirtioDevice};
use vhost_migrate::check::{CheckOptions, CheckReport, FrameSource, check};
use vhost_migrate::dirty::{Log, PageSet};
use vhost_migrate::memory::{Address, GuestAddress, Iova, LOG_PAGE, PageNumber};
use vhost_migrate::ring::{RingBase, RingLayout};
use vhost_migrate::unstable::backend::{
    Logging, MessageOutcome, Notifier, Session, VhostUserMessage, VringConfig, VringController, Workers,
};
use zerocopy::IntoBytes;

use crate::backend_channel::{ChannelFault, ChannelSocket};
use crate::fault::Fault;
use crate::faulty_disk::{FaultyDisk, Region, SharedFiles};
use crate::iommu::{IommuFault, Translations, wait_for_all};
use crate::postcopy::Postcopy;
use crate::state::{StateFault, StateTransfer};
use crate::wire::{is_known, more_follows, receive, send};

const DISK: u64 = 8 << 20;
/// Bit 30 of the features: protocol features.
const BIT_30: u64 = 1 << 30;
/// Bit 26 of the features: LOG_ALL.
const LOG_ALL: u64 = 1 << 26;

/// Ring workers with changed parameters.
struct FaultyBackend {
    fault: Fault,
    workers: Arc<Mutex<Workers>>,
    /// Parameters of each started ring.
    setups: BTreeMap<u16, VringConfig>,
    /// Request in progress.
    code: Code,
    files: Arc<SharedFiles>,
    /// The log of data, and its substitute until the next message.
    substitute_log: Option<(Arc<Log>, Arc<Log>)>,
    translations: Translations,
}

impl FaultyBackend {
    fn new(fault: Fault, device: &Arc<dyn VirtioDevice>, files: Arc<SharedFiles>) -> FaultyBackend {
        let workers = Arc::new(Mutex::new(Workers::new(device.clone())));
        FaultyBackend {
            fault,
            workers,
            setups: BTreeMap::new(),
            code: Code(0),
            files,
            substitute_log: None,
            translations: Translations::default(),
        }
    }

    fn with_log_fault(&mut self, index: u16, mut logging: Logging) -> Logging {
        let Some(setup) = self.setups.get(&index) else { return logging };
        match self.fault {
            Fault::DoesNotLogData => logging.data = None,
            Fault::DoesNotSignalLog => logging.signal = None,
            Fault::IgnoresLogAddress => logging.used = logging.used.map(|(log, _)| (log, setup.layout.areas()[2])),
            Fault::MarksEverything => {
                for region in setup.memory.regions() {
                    logging.data.iter().for_each(|log| log.mark(region.gpa(), region.size()));
                }
            }
            Fault::KeepsOldLog => {
                if let (Some(old), Some(new)) = (&setup.logging.data, &mut logging.data) {
                    *new = old.clone();
                }
            }
            Fault::NeverStopsLogging if setup.logging.data.is_some() && logging.data.is_none() => {
                return setup.logging.clone();
            }
            Fault::StopsLoggingAtMemoryChange
                if [Code::SET_MEM_TABLE, Code::ADD_MEM_REG, Code::REM_MEM_REG].contains(&self.code) =>
            {
                return Logging::default();
            }
            Fault::MarksLate | Fault::Iommu(IommuFault::MarksIova) => {
                logging.data = logging.data.map(|log| match &self.substitute_log {
                    Some((known, late)) if Arc::ptr_eq(known, &log) => late.clone(),
                    _ => {
                        let late = Arc::new(Log::create(GuestAddress(log.pages() * LOG_PAGE)).unwrap().0);
                        self.substitute_log = Some((log, late.clone()));
                        late
                    }
                });
            }
            _ => {}
        }
        logging
    }

    /// Copies the marks of the substitute log since the last message.
    fn copy_late_marks(&self, logs: Option<&(Arc<Log>, Arc<Log>)>) {
        if let Some((log, late)) = logs {
            let mut pages = PageSet::new(late.pages());
            late.harvest(&mut pages);
            for page in pages.iter() {
                log.mark(PageNumber(self.translations.marked(page.0)).address(), 1);
            }
        }
    }

    /// Restarts a running ring at `base`.
    fn start_over(&mut self, index: u16, base: impl FnOnce(RingBase) -> RingBase) {
        let mut workers = self.workers.lock().unwrap();
        let setup = self.setups.get_mut(&index).unwrap();
        setup.base = base(workers.stop(index).unwrap());
        workers.start(index, setup.clone()).unwrap();
    }
}

/// Returns true if the first descriptor of a split ring links to itself.
fn loops(setup: &VringConfig) -> bool {
    let mut links = [0; 4];
    setup.memory.read(setup.layout.areas()[0].unchecked_add(12), &mut links).unwrap();
    links == [1, 0, 0, 0]
}

/// Returns the avail index of a split ring.
fn avail_index(setup: &VringConfig) -> RingBase {
    index_in(setup, 1)
}

/// Returns the index in an area of a split ring: 1 is the avail ring, 2 the used ring.
fn index_in(setup: &VringConfig, area: usize) -> RingBase {
    let mut index = [0; 2];
    setup.memory.read(setup.layout.areas()[area].unchecked_add(2), &mut index).unwrap();
    RingBase::split(u16::from_le_bytes(index))
}

/// Marks all of a ring in the log.
fn mark_ring(setup: &VringConfig) {
    let Some(log) = &setup.logging.data else { return };
    let bytes = RingLayout::area_bytes(setup.features, setup.layout.size());
    setup.layout.areas().into_iter().zip(bytes).for_each(|(gpa, bytes)| log.mark(gpa, bytes));
}

impl VringController for FaultyBackend {
    fn start(&mut self, index: u16, mut setup: VringConfig) -> Result<(), BackendError> {
        self.setups.insert(index, setup.clone());
        setup.logging = self.with_log_fault(index, setup.logging);
        let fresh = self.files.region(|region| region.is_fresh());
        match self.fault {
            Fault::DoesNotWriteInflight => setup.inflight = None,
            Fault::SkipsOpenRequests => (setup.inflight, setup.base) = (None, avail_index(&setup)),
            Fault::IgnoresBase => setup.base = RingBase::default(),
            Fault::SuccessorLogsNothing if setup.inflight.is_some() => setup.logging = Logging::default(),
            // Makes the log look like the one of the previous process.
            Fault::SuccessorMarksOnlyItsWrites => mark_ring(&setup),
            Fault::BackendChannel(ChannelFault::SendsNoCalls) if setup.kick.is_none() => setup.call = None,
            _ => {}
        }
        self.workers.lock().unwrap().start(index, setup)?;
        if self.fault == Fault::StartsFreshRegionAtZero && fresh == Some(true) {
            self.files.region(|region| region.0.write_all_at(&[0; 2], 14).unwrap());
        }
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Result<RingBase, BackendError> {
        if self.fault == Fault::Iommu(IommuFault::BaseWaitsForMisses) {
            wait_for_all(&self.setups[&index]);
        }
        let (area, late) = match self.fault {
            Fault::RepliesBaseEarly => (1, 20),
            Fault::RunsAfterGetBase => (2, 3000),
            _ => return self.workers.lock().unwrap().stop(index),
        };
        let base = index_in(&self.setups[&index], area);
        // Stops with the connection: an interface that continues would take the frames of the next one.
        let workers = Arc::downgrade(&self.workers);
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(late));
            workers.upgrade().map(|workers| workers.lock().unwrap().stop(index))
        });
        Ok(base)
    }

    fn invalidate(&mut self, iovas: &RangeInclusive<Iova>) {
        if self.fault == Fault::Iommu(IommuFault::InvalidatesTooEarly) {
            let (workers, iovas) = (self.workers.clone(), iovas.clone());
            thread::spawn(move || workers.lock().unwrap().invalidate(&iovas));
            return;
        }
        self.workers.lock().unwrap().invalidate(iovas);
    }

    fn kick(&mut self, index: u16) {
        if self.fault == Fault::BackendChannel(ChannelFault::IgnoresKicks) {
            return;
        }
        self.workers.lock().unwrap().kick(index);
    }

    fn set_logging(&mut self, index: u16, logging: Logging) {
        let before = self.substitute_log.clone();
        let bent = self.with_log_fault(index, logging);
        if let Some(setup) = self.setups.get_mut(&index) {
            setup.logging = bent.clone();
        }
        self.workers.lock().unwrap().set_logging(index, bent);
        // Marks that went into the substitute of the old log meanwhile.
        self.copy_late_marks(before.as_ref());
        if self.fault == Fault::RewindsOnSetAddr && self.code == Code::SET_VRING_ADDR {
            self.start_over(index, |base| RingBase::split(base.split_index().saturating_sub(1)));
        }
    }

    fn set_notifiers(&mut self, index: u16, call: Option<Arc<Notifier>>, error: Option<Arc<Notifier>>) {
        if self.fault == Fault::ForgetsPendingCall {
            let setup = self.setups.get_mut(&index).unwrap();
            (setup.call, setup.error) = (call, error);
            return self.start_over(index, |base| base);
        }
        self.workers.lock().unwrap().set_notifiers(index, call, error);
    }
}

/// End of a connection.
#[derive(PartialEq, Eq)]
enum ConnectionEnd {
    HungUp,
    /// The process exits.
    Died,
}

/// Serves one connection with a fault.
fn serve(
    mut socket: UnixStream,
    device: &Arc<dyn VirtioDevice>,
    files: &Arc<SharedFiles>,
    fault: Fault,
) -> ConnectionEnd {
    let mut rings = FaultyBackend::new(fault, device, files.clone());
    // Dropped first: this releases workers that wait for pages.
    let mut session = Session::new(device.clone());
    let mut postcopy = Postcopy::new(fault);
    let (mut seen_memory, mut seen_log, mut kept, mut transfer) = (false, false, Vec::new(), StateTransfer::default());
    files.forget();
    loop {
        let Some(mut message) = receive(&mut socket, fault) else {
            return if postcopy.hung_up() { ConnectionEnd::Died } else { ConnectionEnd::HungUp };
        };
        let (code, flags, payload) = (message.code, message.flags, message.payload.clone());
        rings.code = code;
        rings.copy_late_marks(rings.substitute_log.as_ref());
        let number = || payload.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        // Refused messages are truncated.
        let mut refuse = false;
        match (fault, code) {
            (Fault::DiesOfUnknownRequest, code) if code.name().is_none() => return ConnectionEnd::Died,
            (Fault::DiesOfShortPayload, _) if payload.len() == 3 => return ConnectionEnd::Died,
            (Fault::DiesOfVersion, _) if !is_known(flags) => return ConnectionEnd::Died,
            (Fault::DiesOf(of, bytes), _) if code == of && payload.starts_with(bytes) => return ConnectionEnd::Died,
            (Fault::DiesOfLoop, _) if rings.setups.values().any(loops) => return ConnectionEnd::Died,
            (Fault::DeviceState(StateFault::DiesOfOnes), Code::CHECK_DEVICE_STATE)
                if transfer.whole().starts_with(&[0xff; 8]) =>
            {
                return ConnectionEnd::Died;
            }
            (Fault::HangsUpAtResetOwner, Code::RESET_OWNER) => return ConnectionEnd::HungUp,
            (Fault::BackendChannel(ChannelFault::EndsConnection), _)
                if files.channel(ChannelSocket::is_over) == Some(true) =>
            {
                return ConnectionEnd::HungUp;
            }
            (Fault::BackendChannel(ChannelFault::IgnoresReplacement), Code::SET_BACKEND_REQ_FD)
                if files.channel(|_| ()).is_some() =>
            {
                message.fds = vec![UnixStream::pair().unwrap().0.into()];
            }
            (Fault::BackendChannel(ChannelFault::Floods), Code::SET_BACKEND_REQ_FD) => {
                let theirs = std::mem::replace(&mut message.fds, vec![UnixStream::pair().unwrap().0.into()]);
                theirs.into_iter().for_each(|fd| ChannelSocket::new(fd).flood());
            }
            (Fault::BackendChannel(ChannelFault::KicksDoNotStart), Code::VRING_KICK) => {
                refuse = rings.setups.is_empty()
            }
            (Fault::DeviceState(StateFault::NoStateBeforeStart), Code::SET_DEVICE_STATE_FD) => {
                refuse = rings.setups.is_empty()
            }
            (Fault::DeviceState(fault), Code::SET_DEVICE_STATE_FD) => transfer.begin(fault, &mut message),
            (Fault::Iommu(fault), _) if !rings.translations.fault(fault, &mut message) => return ConnectionEnd::HungUp,
            (Fault::IgnoresUnknownRequests, code) if code.name().is_none() => continue,
            (Fault::IgnoresResetDevice, Code::RESET_DEVICE) => continue,
            (Fault::KeepsFds, code) if code.name().is_none() => kept.append(&mut message.fds),
            (Fault::NeedsExactTableSize, Code::SET_MEM_TABLE) => {
                refuse = payload.len() != 8 + 32 * usize::from(payload[0])
            }
            (Fault::NeedsMemoryBeforeInflight, Code::SET_INFLIGHT_FD) => refuse = !seen_memory,
            (Fault::ChecksUnusedLogAddress, Code::SET_VRING_ADDR) => refuse = payload.ends_with(&[0xff; 8]),
            (Fault::NeedsLogBeforeLogAll, Code::SET_FEATURES) => refuse = number() & LOG_ALL != 0 && !seen_log,
            (Fault::NeedsEnable, Code::SET_FEATURES) => message.payload = (number() | BIT_30).as_bytes().to_vec(),
            (Fault::IgnoresStatusReset, Code::SET_STATUS) => message.payload = 15u64.as_bytes().to_vec(),
            (Fault::IgnoresLogOffset, Code::SET_LOG_BASE) if payload.len() == 16 => message.payload[8..].fill(0),
            (Fault::IgnoresLogSize, Code::SET_LOG_BASE) if payload.len() == 16 => {
                let offset = u64::from_ne_bytes(payload[8..].try_into().unwrap());
                let file = fstat(&message.fds[0]).unwrap().st_size as u64;
                message.payload[..8].copy_from_slice((file - offset).as_bytes());
            }
            (Fault::AcceptsEmptyLog, Code::SET_LOG_BASE) if number() == 0 => {
                message.payload[..8].copy_from_slice(8u64.as_bytes())
            }
            (Fault::IgnoresSocketCallFds, Code::SET_VRING_CALL) => message.fds.iter_mut().for_each(|fd| {
                if SFlag::from_bits_truncate(fstat(&*fd).unwrap().st_mode) & SFlag::S_IFMT == SFlag::S_IFSOCK {
                    *fd = EventFd::new().unwrap().into();
                }
            }),
            _ => {}
        }
        if let Some((bytes, fd)) = postcopy.message(&mut message) {
            send(&socket, &bytes, fd.as_ref());
            continue;
        }
        if refuse {
            message.payload.truncate(2);
        }
        seen_memory |= code == Code::SET_MEM_TABLE;
        seen_log |= code == Code::SET_LOG_BASE;
        files.note(&message);
        if fault == Fault::DiesOfNoise && files.region(Region::is_noise) == Some(true) {
            return ConnectionEnd::Died;
        }
        let kept_region =
            if fault == Fault::KeepsRegionAtReset { files.region(|region| region.header()) } else { None };
        let step = session.handle_message(message, &mut rings);
        if let Some(header) = kept_region.filter(|_| code == Code::RESET_DEVICE) {
            files.region(|region| region.0.write_all_at(&header, 0).unwrap());
        }
        if fault == Fault::RunsDisabledRings && code == Code::SET_VRING_KICK {
            let enable = VhostUserMessage {
                code: Code::SET_VRING_ENABLE,
                flags: 1,
                payload: vec![0, 0, 0, 0, 1, 0, 0, 0],
                fds: vec![],
            };
            session.handle_message(enable, &mut rings);
        }
        let more = postcopy.more(code, flags, &payload);
        let mut reply = match step {
            MessageOutcome::NoReply => {
                more.iter().for_each(|bytes| send(&socket, bytes, None));
                continue;
            }
            MessageOutcome::Reply(reply) => reply,
            MessageOutcome::Close(_) => return ConnectionEnd::HungUp,
        };
        let mut bytes = reply.to_bytes();
        match (fault, code) {
            (Fault::CopiesNeedReplyFlag, _) => bytes[4] |= flags as u8 & 8,
            (Fault::IgnoresConfigOffset, Code::GET_CONFIG) if payload[..4] != [0; 4] => bytes[24..].fill(0x77),
            (Fault::LongLogReply, Code::SET_LOG_BASE) if bytes.len() == 28 => {
                bytes.extend([0; 8]);
                bytes[8] = 24;
            }
            (Fault::Iommu(IommuFault::HangsUpOnInvalid), Code::IOTLB_MSG) if bytes[12] != 0 => {
                return ConnectionEnd::HungUp;
            }
            (Fault::OffersFewSlots, Code::GET_MAX_MEM_SLOTS) => bytes[12..].copy_from_slice(8u64.as_bytes()),
            (Fault::ReportsHalfRegion, Code::GET_INFLIGHT_FD) => {
                let size = u64::from_ne_bytes(bytes[12..20].try_into().unwrap());
                bytes[12..20].copy_from_slice((size / 2).as_bytes());
            }
            (Fault::DeviceState(fault), Code::CHECK_DEVICE_STATE) => match (fault, bytes[12] != 0) {
                (StateFault::AcceptsAnything, _) => bytes[12] = 0,
                (StateFault::HangsUpOnRefusal, true) => return ConnectionEnd::HungUp,
                (StateFault::ResetsOnRefusal, true) => device.reset(),
                (StateFault::RefusesAfterRefusal, true) => transfer.has_refused = true,
                (StateFault::RefusesAfterRefusal, false) if transfer.loads() => bytes[12] = transfer.has_refused.into(),
                (StateFault::ForgetsState, false) if transfer.loads() => device.reset(),
                _ => {}
            },
            (Fault::RepliesOutOfOrder, Code::GET_PROTOCOL_FEATURES) if more_follows(&socket) => {
                // The next request is answered before this one.
                let Some(next) = receive(&mut socket, fault) else { return ConnectionEnd::HungUp };
                if let MessageOutcome::Reply(first) = session.handle_message(next, &mut rings) {
                    send(&socket, &first.to_bytes(), first.fd.as_ref());
                }
            }
            _ => {}
        }
        postcopy.reply(code, &payload, &mut bytes, &mut reply.fd);
        send(&socket, &bytes, reply.fd.as_ref());
        more.iter().for_each(|bytes| send(&socket, bytes, None));
        if (fault, code) == (Fault::DeviceState(StateFault::BlocksWhileLoading), Code::SET_DEVICE_STATE_FD)
            && bytes[12] == 0
        {
            transfer.whole();
        }
        if fault == Fault::SendsSecondReply
            && flags & 8 != 0
            && code.name().is_some_and(|name| name.starts_with("GET_"))
        {
            let header = Header { request: code.0, flags: 5, size: 8 };
            send(&socket, &[header.as_bytes(), &[0; 8]].concat(), None);
        }
    }
}

pub(crate) fn image(folder: &Path) -> BlkOptions {
    let image = folder.join("image");
    let bytes: Vec<u8> = (0..DISK as u32).map(|byte| (byte / 97) as u8).collect();
    std::fs::write(&image, bytes).unwrap();
    BlkOptions::new(image).with_max_queue_size(256).with_serial("check".into())
}

/// A back-end with a fault, served at its own socket until it is dropped.
pub(crate) struct Backend {
    folder: TempDir,
    server: Option<JoinHandle<()>>,
}

impl Backend {
    /// Starts a disk.
    pub(crate) fn start(fault: Fault) -> Backend {
        let folder = tempfile::tempdir().unwrap();
        let iommu = matches!(fault, Fault::Iommu(_) | Fault::BackendChannel(ChannelFault::Floods));
        let postcopy = matches!(fault, Fault::Postcopy(_));
        let disk = BlkDevice::open(image(folder.path()).with_iommu(iommu).with_postcopy(postcopy)).unwrap();
        let files = Arc::new(SharedFiles::default());
        let device: Arc<dyn VirtioDevice> = Arc::new(FaultyDisk { disk, fault, files: files.clone() });
        Backend::serving(folder, device, files, fault)
    }

    /// Starts a network interface that sends back what it receives.
    pub(crate) fn net(fault: Fault) -> Backend {
        let net = NetDevice::open(NetOptions::new(NetPeer::Loopback, [2, 0, 0, 0, 0, 1])).unwrap();
        Backend::serving(tempfile::tempdir().unwrap(), Arc::new(net), Arc::default(), fault)
    }

    pub(crate) fn serving(
        folder: TempDir,
        device: Arc<dyn VirtioDevice>,
        files: Arc<SharedFiles>,
        fault: Fault,
    ) -> Backend {
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let server = thread::spawn(move || {
            for connection in listener.incoming() {
                // The test ends the server with a byte that does not begin a message.
                let connection = connection.unwrap();
                let mut first = [0];
                let peeked = recv(connection.as_raw_fd(), &mut first, MsgFlags::MSG_PEEK);
                if peeked == Ok(1) && first == [0xff]
                    || serve(connection, &device, &files, fault) == ConnectionEnd::Died
                {
                    break;
                }
            }
        });
        Backend { folder, server: Some(server) }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Checks the back-end.
    pub(crate) fn checked(&self, options: CheckOptions) -> CheckReport {
        check(&self.socket(), &options.with_timeout(Duration::from_secs(4))).unwrap()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Ok(mut goodbye) = UnixStream::connect(self.socket()) {
            let _ = goodbye.write_all(&[0xff]);
        }
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

/// Checks a back-end with a fault: a disk, unless the fault needs a network interface.
pub(crate) fn checked(fault: Fault, options: CheckOptions) -> CheckReport {
    match fault {
        Fault::DeviceState(_) => Backend::net(fault).checked(options.with_frame_source(Some(FrameSource::Loop))),
        _ => Backend::start(fault).checked(options),
    }
}
