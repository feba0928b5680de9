//! DPDK's testpmd as a process: with a port that is a vhost-user back-end, or one that is a front-end.

use std::path::Path;
use std::process::ExitStatus;

use crate::backend::{listens, words};
use crate::process::{Lab, Process, wait_for};

/// A running testpmd with one port, which forwards as it was told from the beginning. It polls: it takes a CPU for itself.
pub(crate) struct Testpmd(Process);

/// Counters of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) received: u64,
    pub(crate) received_bytes: u64,
    pub(crate) sent: u64,
    pub(crate) errors: u64,
}

impl Testpmd {
    /// A back-end that listens at `socket` and sends back what it receives. `options` are its port's.
    pub(crate) fn backend(lab: &Lab, socket: &Path, queues: u16, options: &str) -> Testpmd {
        let port = format!("net_vhost0,iface={},queues={queues}{options}", socket.display());
        let mut testpmd = Testpmd::start(lab, "librte_net_vhost.so", &port, queues, "--forward-mode=io");
        wait_for("testpmd listens", || {
            testpmd.0.assert_running();
            listens(socket).then_some(())
        });
        testpmd
    }

    /// A front-end of the back-end at `socket`, which sends packets all the time. `options` are its port's.
    pub(crate) fn frontend(lab: &Lab, socket: &Path, queues: u16, options: &str) -> Testpmd {
        let port = format!("net_virtio_user0,path={},queues={queues}{options}", socket.display());
        Testpmd::start(lab, "librte_net_virtio.so", &port, queues, "--forward-mode=flowgen")
    }

    fn start(lab: &Lab, driver: &str, port: &str, queues: u16, forwarding: &str) -> Testpmd {
        let name = format!("testpmd-{}", &driver["librte_net_".len()..]);
        let log = lab.file(&format!("{name}.log"));
        // Instances meet in a folder for what runs.
        let args = format!(
            "RUNTIME_DIRECTORY={} dpdk-testpmd -l 0,1 --no-huge --no-shconf --no-telemetry -m 256 --no-pci -d {driver} \
             --vdev {port} -- --no-numa --nb-cores=1 --total-num-mbufs=4096 --rxq={queues} --txq={queues} \
             --stats-period 1 {forwarding}",
            lab.file("").display()
        );
        Testpmd(Process::start(&name, "env", &words(&args), &log))
    }

    /// The last reported counters of its port.
    pub(crate) fn counters(&mut self) -> Option<Counters> {
        self.0.assert_running();
        let output = self.0.output();
        let told = &output[output.rfind("NIC statistics")?..];
        let number = |name: &str| told.split(name).nth(1)?.split_whitespace().next()?.parse::<u64>().ok();
        Some(Counters {
            received: number("RX-packets:")?,
            received_bytes: number("RX-bytes:")?,
            sent: number("TX-packets:")?,
            errors: number("RX-errors:")? + number("TX-errors:")?,
        })
    }

    /// Number of times that its port's link went up or down.
    pub(crate) fn link_changes(&self) -> usize {
        self.0.output().matches("link state change event").count()
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.0.wait()
    }

    /// Stops forwarding, then all rings, and ends.
    pub(crate) fn end(&mut self) {
        self.0.terminate();
        let output = self.0.output();
        assert!(output.contains("Bye..."), "{output}");
    }
}
