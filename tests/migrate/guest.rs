//! A small guest that writes continuously and verifies every byte of its memory. It does not depend on connections.
//!
//! Memory is two regions, one above 4 GiB. The contents of a page follow from its address and version. The table of
//! versions is the guest's "CPU state", so that memory is checked against data that does not move as memory.

use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, TryRecvError, bounded, unbounded};
use vhost_migrate::dirty::{DirtyError, DirtySource, Harvest, Log, LogSource, PageSet, UnionSource};
use vhost_migrate::memory::{Address, GuestAddress, LOG_PAGE, Memory, Region};
use vhost_migrate::migrate::{IncomingVm, RegionLayout, SourceVm, VmError};
use vhost_migrate::stream::CancelToken;

/// Start of the second region.
pub(crate) const HIGH: GuestAddress = GuestAddress(4 << 30);
/// Time limit of every wait in these tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const PAGE: usize = LOG_PAGE as usize;

/// The memory of a guest of `pages` pages, half of it below and half of it above 4 GiB.
pub(crate) fn layout(pages: u64) -> [RegionLayout; 2] {
    let size = pages / 2 * LOG_PAGE;
    [RegionLayout { gpa: GuestAddress(0), size }, RegionLayout { gpa: HIGH, size }]
}

/// Calls made to a [`Guest`].
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub(crate) struct Calls {
    pub(crate) pauses: u32,
    pub(crate) resumes: u32,
    pub(crate) releases: u32,
}

/// Faults of a VM, its devices or its dirty log.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum GuestFault {
    None,
    /// The dirty log is off: no write is reported.
    LogOff,
    /// Every harvest finds all pages dirty.
    AlwaysDirty,
    /// The third harvest fails halfway.
    HarvestFails,
    /// Tracking cannot be started.
    NoTracking,
    PauseFails,
    StateFails,
    /// Neither pausing nor resuming succeeds.
    ResumeFails,
    /// A device is unavailable for this long after the first check.
    Away(Duration),
}

/// A guest, running or not.
pub(crate) struct Guest {
    memory: Memory,
    tracker: Arc<Mutex<Tracker>>,
    fault: GuestFault,
    pub(crate) calls: Calls,
    /// True if the last pause has stopped the CPU.
    paused: bool,
    away_since: OnceLock<Instant>,
    vcpu: Vcpu,
}

enum Vcpu {
    Stopped(Box<Writer>),
    Running { commands: Sender<VcpuCommand>, thread: JoinHandle<Box<Writer>> },
}

enum VcpuCommand {
    Stop,
    /// Reply after the next write.
    WriteOnce(Sender<()>),
    /// Write every page once, then reply.
    WriteAll(Sender<()>),
}

/// The writing thread and its state.
struct Writer {
    memory: Memory,
    log: Arc<Log>,
    versions: Vec<u32>,
    random: u64,
}

impl Guest {
    /// A running guest of `pages` pages, all of them written.
    pub(crate) fn running(pages: u64) -> Guest {
        let mut guest = Guest::idle(pages);
        guest.start();
        guest
    }

    /// A guest whose CPU does nothing until it is resumed.
    pub(crate) fn idle(pages: u64) -> Guest {
        let memory = make_memory(&layout(pages));
        let mut guest = Guest::new(memory, (0..pages as u32).map(|page| page % 5).collect(), 1);
        let writer = guest.writer();
        for page in 0..pages as usize {
            writer.write(page);
        }
        // These writes were before tracking.
        writer.log.harvest_stopped(&mut PageSet::default());
        guest
    }

    /// Sets a fault.
    pub(crate) fn with_fault(mut self, fault: GuestFault) -> Guest {
        self.fault = fault;
        self
    }

    fn new(memory: Memory, versions: Vec<u32>, random: u64) -> Guest {
        let log = Arc::new(Log::create(memory.end()).unwrap().0);
        let devices: [Box<dyn DirtySource>; 1] = [Box::new(LogSource::new("writer", log.clone()))];
        let tracker = Tracker {
            union: UnionSource::new(devices),
            unsent: PageSet::default(),
            returned: PageSet::default(),
            tracking: false,
            starts: 0,
            harvests: 0,
            put_backs: 0,
        };
        let vcpu = Vcpu::Stopped(Box::new(Writer { memory: memory.clone(), log, versions, random }));
        let tracker = Arc::new(Mutex::new(tracker));
        Guest {
            memory,
            tracker,
            fault: GuestFault::None,
            calls: Calls::default(),
            paused: false,
            away_since: OnceLock::new(),
            vcpu,
        }
    }

    fn writer(&mut self) -> &mut Writer {
        match &mut self.vcpu {
            Vcpu::Stopped(writer) => writer,
            Vcpu::Running { .. } => panic!("the guest runs"),
        }
    }

    pub(crate) fn start(&mut self) {
        let (commands, inbox) = unbounded();
        let Vcpu::Stopped(mut writer) = std::mem::replace(&mut self.vcpu, Vcpu::none(&self.memory)) else {
            panic!("the guest runs already");
        };
        let thread = std::thread::spawn(move || {
            writer.run(&inbox);
            writer
        });
        self.vcpu = Vcpu::Running { commands, thread };
    }

    pub(crate) fn stop(&mut self) {
        let Vcpu::Running { commands, thread } = std::mem::replace(&mut self.vcpu, Vcpu::none(&self.memory)) else {
            panic!("the guest does not run");
        };
        commands.send(VcpuCommand::Stop).unwrap();
        self.vcpu = Vcpu::Stopped(thread.join().unwrap());
    }

    pub(crate) fn is_running(&self) -> bool {
        matches!(self.vcpu, Vcpu::Running { .. })
    }

    /// Waits until the guest has written once more.
    pub(crate) fn wait_for_write(&self) {
        let Vcpu::Running { commands, .. } = &self.vcpu else { panic!("the guest does not run") };
        ask(commands, VcpuCommand::WriteOnce);
    }

    /// Checks every byte of a stopped guest's memory against its CPU's state.
    pub(crate) fn check(&mut self) -> Result<(), String> {
        self.writer().check()
    }

    /// Asserts the result of a migration that failed before its commit: the guest runs here unharmed, tracking is off,
    /// and pages that were found dirty but not sent are found again (rule L14.1).
    pub(crate) fn assert_runs_unharmed(&mut self) {
        assert!(self.is_running());
        self.wait_for_write();
        assert_eq!(self.calls.pauses, self.calls.resumes, "resumed if it was paused, and only then");
        assert_eq!(self.calls.releases, 0);
        {
            let mut tracker = self.tracker.lock().unwrap();
            assert!(!tracker.tracking, "tracking was not switched off");
            assert_eq!(tracker.put_backs, tracker.starts);
            let mut lost = std::mem::take(&mut tracker.unsent);
            lost.difference(&tracker.returned);
            assert!(lost.is_empty(), "{} pages were found dirty, not sent and forgotten", lost.len());
            let mut again = PageSet::default();
            tracker.union.harvest(&mut again).unwrap();
            let mut lost = std::mem::take(&mut tracker.returned);
            lost.difference(&again);
            assert!(lost.is_empty(), "{} pages were put back and are not found again", lost.len());
            (tracker.starts, tracker.put_backs) = (0, 0);
        }
        self.stop();
        self.check().unwrap();
        self.start();
        self.calls = Calls::default();
        self.fault = GuestFault::None;
    }

    /// Asserts the result of a committed migration: the guest has stopped here for good.
    pub(crate) fn assert_released(&self) {
        assert!(!self.is_running());
        assert_eq!(self.calls, Calls { pauses: 1, resumes: 0, releases: 1 });
        assert!(!self.tracker.lock().unwrap().tracking);
    }

    /// Asserts the result of a migration of unknown outcome: the guest is paused here, intact, and can resume.
    pub(crate) fn assert_kept_paused(&mut self) {
        assert!(!self.is_running());
        assert_eq!(self.calls, Calls { pauses: 1, resumes: 0, releases: 0 });
        assert!(!self.tracker.lock().unwrap().tracking);
        self.check().unwrap();
    }

    /// Resumes a kept guest like an operator.
    pub(crate) fn resume_unharmed(&mut self) {
        self.resume().unwrap();
        self.assert_runs_unharmed();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.is_running() {
            self.stop();
        }
    }
}

impl SourceVm for Guest {
    fn memory(&self) -> Memory {
        self.memory.clone()
    }

    fn is_running(&self) -> bool {
        Guest::is_running(self)
    }

    fn dirty_source(&mut self) -> Result<Box<dyn DirtySource>, VmError> {
        let commands = match &self.vcpu {
            Vcpu::Running { commands, .. } => Some(commands.clone()),
            Vcpu::Stopped(_) => None,
        };
        let memory = self.memory.clone();
        Ok(Box::new(Tracked { tracker: self.tracker.clone(), memory, fault: self.fault, commands }))
    }

    fn devices(&mut self) -> Result<Option<Vec<u8>>, VmError> {
        Ok(Some(DEVICES.into()))
    }

    fn blocker(&self) -> Option<String> {
        let GuestFault::Away(time) = self.fault else { return None };
        let is_away = self.away_since.get_or_init(Instant::now).elapsed() < time;
        is_away.then(|| "its disk is away".into())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.calls.pauses += 1;
        self.paused = self.is_running();
        if self.paused {
            self.stop();
        }
        if matches!(self.fault, GuestFault::PauseFails | GuestFault::ResumeFails) {
            Err("a ring does not drain".into())
        } else {
            Ok(())
        }
    }

    /// The versions, then the random state.
    fn state(&mut self) -> Result<Vec<u8>, VmError> {
        if self.fault == GuestFault::StateFails {
            return Err("a device keeps its state to itself".into());
        }
        let writer = self.writer();
        let mut state: Vec<u8> = writer.versions.iter().flat_map(|version| version.to_le_bytes()).collect();
        state.extend(writer.random.to_le_bytes());
        Ok(state)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.calls.resumes += 1;
        if self.fault == GuestFault::ResumeFails {
            return Err("a ring does not start".into());
        }
        if std::mem::take(&mut self.paused) {
            self.start();
        }
        Ok(())
    }

    fn release(&mut self) {
        self.calls.releases += 1;
    }
}

impl Vcpu {
    fn none(memory: &Memory) -> Vcpu {
        let log = Arc::new(Log::create(GuestAddress(LOG_PAGE)).unwrap().0);
        Vcpu::Stopped(Box::new(Writer { memory: memory.clone(), log, versions: Vec::new(), random: 0 }))
    }
}

fn ask(commands: &Sender<VcpuCommand>, order: fn(Sender<()>) -> VcpuCommand) {
    let (done, answer) = bounded(1);
    commands.send(order(done)).unwrap();
    answer.recv_timeout(PATIENCE).unwrap();
}

impl Writer {
    /// Writes random pages until it receives a command to stop.
    fn run(&mut self, commands: &Receiver<VcpuCommand>) {
        loop {
            let answer = match commands.try_recv() {
                Ok(VcpuCommand::WriteOnce(answer)) => Some(answer),
                Ok(VcpuCommand::WriteAll(answer)) => {
                    (0..self.versions.len()).for_each(|page| self.write(page));
                    Some(answer)
                }
                Ok(VcpuCommand::Stop) | Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => None,
            };
            self.random = mix(self.random);
            let page = (self.random >> 16) as usize % self.versions.len();
            self.write(page);
            // There may be few CPUs, and the migration needs them.
            std::thread::yield_now();
            if let Some(answer) = answer {
                answer.send(()).unwrap();
            }
        }
    }

    /// Writes the next version of the page with this number in the table.
    fn write(&mut self, page: usize) {
        self.versions[page] += 1;
        let gpa = self.gpa(page);
        self.memory.write(gpa, &contents(gpa, self.versions[page])).unwrap();
        self.log.mark(gpa, LOG_PAGE);
    }

    fn gpa(&self, page: usize) -> GuestAddress {
        let half = self.versions.len() / 2;
        let (start, page) = if page < half { (GuestAddress(0), page) } else { (HIGH, page - half) };
        start.unchecked_add(page as u64 * LOG_PAGE)
    }

    fn check(&self) -> Result<(), String> {
        let mut found = [0; PAGE];
        for (page, version) in self.versions.iter().enumerate() {
            let gpa = self.gpa(page);
            self.memory.read(gpa, &mut found).unwrap();
            let wanted = contents(gpa, *version);
            if found != wanted {
                let at = (0..PAGE).find(|at| found[*at] != wanted[*at]).unwrap_or_default();
                let address = gpa.0 + at as u64;
                return Err(format!(
                    "memory at {address:#x} is {:#04x}, not {:#04x} as version {version} of its page has",
                    found[at], wanted[at]
                ));
            }
        }
        Ok(())
    }
}

/// Returns the contents of a page: every fifth version is zeros; of the others, one page of four is incompressible.
fn contents(GuestAddress(gpa): GuestAddress, version: u32) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    if version.is_multiple_of(5) {
        return page;
    }
    let mut word = mix(gpa ^ u64::from(version) << 40);
    if (gpa / LOG_PAGE).is_multiple_of(4) {
        for bytes in page.as_chunks_mut().0 {
            *bytes = word.to_le_bytes();
            word = mix(word);
        }
    } else {
        page.as_chunks_mut().0.fill(word.to_le_bytes());
    }
    page
}

/// A step of splitmix64.
fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn make_memory(regions: &[RegionLayout]) -> Memory {
    // One memfd per region: no file is as large as all of memory.
    Memory::new(regions.iter().map(|region| Arc::new(Region::create(region.gpa, region.size).unwrap()))).unwrap()
}

/// Records about a guest's dirty sources. They outlive the migrations.
struct Tracker {
    union: UnionSource,
    /// Pages found dirty that may not have been sent.
    unsent: PageSet,
    /// Pages that were put back.
    returned: PageSet,
    tracking: bool,
    starts: u32,
    harvests: u32,
    put_backs: u32,
}

/// The dirty source of one migration.
struct Tracked {
    tracker: Arc<Mutex<Tracker>>,
    memory: Memory,
    fault: GuestFault,
    commands: Option<Sender<VcpuCommand>>,
}

impl Tracked {
    fn harvest_with(
        &mut self,
        into: &mut PageSet,
        harvest: fn(&mut UnionSource, &mut PageSet) -> Result<Harvest, DirtyError>,
    ) -> Result<Harvest, DirtyError> {
        let mut tracker = self.tracker.lock().unwrap();
        assert!(tracker.tracking, "a harvest before the start");
        let mut found = PageSet::default();
        let result = match self.fault {
            GuestFault::LogOff => Harvest::default(),
            _ => harvest(&mut tracker.union, &mut found)?,
        };
        into.union(&found);
        tracker.unsent = found;
        tracker.harvests += 1;
        if self.fault == GuestFault::HarvestFails && tracker.harvests == 3 {
            let cause = "a device has gone".into();
            return Err(DirtyError::Source { name: self.name().into(), cause });
        }
        Ok(result)
    }
}

impl DirtySource for Tracked {
    fn start(&mut self) -> Result<(), DirtyError> {
        let mut tracker = self.tracker.lock().unwrap();
        if self.fault == GuestFault::NoTracking {
            return Err(DirtyError::Source { name: "test".into(), cause: "no log here".into() });
        }
        assert!(!std::mem::replace(&mut tracker.tracking, true), "started twice");
        tracker.starts += 1;
        tracker.harvests = 0;
        tracker.unsent = PageSet::new(self.memory.end().0 / LOG_PAGE);
        for region in self.memory.regions() {
            tracker.unsent.insert_range(region.pages());
        }
        tracker.union.start()
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        if let Some(commands) = &self.commands {
            // The guest writes in every round, however short.
            ask(
                commands,
                if self.fault == GuestFault::AlwaysDirty { VcpuCommand::WriteAll } else { VcpuCommand::WriteOnce },
            );
        }
        self.harvest_with(into, |union, into| union.harvest(into))
    }

    fn harvest_stopped(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        self.harvest_with(into, |union, into| union.harvest_stopped(into))
    }

    fn put_back(&mut self, pages: &PageSet) {
        let mut tracker = self.tracker.lock().unwrap();
        tracker.put_backs += 1;
        tracker.returned = pages.clone();
        tracker.union.put_back(pages);
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        let mut tracker = self.tracker.lock().unwrap();
        tracker.tracking = false;
        tracker.union.stop()
    }

    fn name(&self) -> &str {
        "test"
    }
}

/// A guest at the destination. Everything is checked before it may run.
#[derive(Default)]
pub(crate) struct IncomingGuest {
    /// The guest after the restore; it runs after the start.
    pub(crate) guest: Option<Guest>,
    memory: Option<Memory>,
    refuse: Option<RefusalPoint>,
}

/// Step at which a destination refuses the guest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum RefusalPoint {
    Prepare,
    OtherMemory,
    Devices,
    Restore,
    /// At every attempt.
    Start,
    /// At the first attempt.
    FirstStart,
    /// The start succeeds, but takes longer than the source waits.
    SlowStart,
}

/// The description of the guest's devices.
const DEVICES: &[u8] = b"a writer";

/// Duration of a slow start.
pub(crate) const SLOW_START: Duration = Duration::from_secs(2);

/// The reason of a refusal.
pub(crate) const REFUSAL_REASON: &str = "no memory left in this test";

impl IncomingGuest {
    pub(crate) fn new(refuse: Option<RefusalPoint>) -> IncomingGuest {
        IncomingGuest { refuse, ..IncomingGuest::default() }
    }

    fn refuse(&self, when: RefusalPoint) -> Result<(), VmError> {
        if self.refuse == Some(when) { Err(REFUSAL_REASON.into()) } else { Ok(()) }
    }
}

impl IncomingVm for IncomingGuest {
    fn prepare(&mut self, regions: &[RegionLayout]) -> Result<Memory, VmError> {
        self.refuse(RefusalPoint::Prepare)?;
        let memory = match self.refuse {
            Some(RefusalPoint::OtherMemory) => make_memory(&layout(2)),
            _ => make_memory(regions),
        };
        self.memory = Some(memory.clone());
        Ok(memory)
    }

    fn prepare_devices(&mut self, devices: &[u8]) -> Result<(), VmError> {
        assert!(self.memory.is_some() && devices == DEVICES);
        self.refuse(RefusalPoint::Devices)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VmError> {
        self.refuse(RefusalPoint::Restore)?;
        let memory = self.memory.take().unwrap();
        let (versions, random) = state.split_last_chunk().unwrap();
        let versions = versions.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        let mut guest = Guest::new(memory, versions, u64::from_le_bytes(*random));
        guest.check()?;
        self.guest = Some(guest);
        Ok(())
    }

    fn start(&mut self, run: bool, _: &CancelToken) -> Result<Option<u64>, VmError> {
        self.refuse(RefusalPoint::Start)?;
        if self.refuse == Some(RefusalPoint::FirstStart) {
            self.refuse = None;
            return Err(REFUSAL_REASON.into());
        }
        if self.refuse == Some(RefusalPoint::SlowStart) {
            std::thread::sleep(SLOW_START);
        }
        if run {
            self.guest.as_mut().unwrap().start();
        }
        Ok(None)
    }
}
