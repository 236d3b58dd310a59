//! What a descriptor costs on its way from one process to another: a manifest of many eventfds, offered and handed over.

use std::os::fd::OwnedFd;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Resource, getrlimit};
use serde_json::{Value, json};
use vmferry_cpr::give::GiverDeadlines;
use vmferry_cpr::handout::Handout;
use vmferry_cpr::manifest::{FdKind, Stage};
use vmferry_cpr::socket::CprSocket;
use vmferry_cpr::spawn;
use vmferry_cpr::take::TakerDeadlines;
use vmferry_cpr::takeover::Offered;
use vmferry_transport::units::MigrationId;

use crate::median;

/// Environment variable that makes this program the one that takes.
pub(crate) const BE_TAKER: &str = "VMFERRY_UPGRADE_BE_TAKER";
/// What a process has open besides.
const SPARE: usize = 64;

/// Hands over so many descriptors, `runs` times each.
pub(crate) fn measure(counts: &[usize], runs: usize) -> Result<Vec<Value>> {
    let mut cases = Vec::new();
    for &count in counts {
        let most = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        if u64::try_from(count + SPARE)? > most {
            eprintln!("{count} descriptors: not measured, {most} may be open here (ulimit -n)");
            continue;
        }
        let fds: Vec<OwnedFd> = (0..count)
            .map(|_| eventfd(0, EventfdFlags::CLOEXEC))
            .collect::<Result<_, _>>()?;
        let mut samples = Vec::new();
        for _ in 0..runs {
            samples.push(hand_over(&fds)?);
        }
        let whole = median(samples.iter().map(|sample| sample.0).collect());
        let second = median(samples.iter().map(|sample| sample.1).collect());
        #[expect(clippy::cast_precision_loss, reason = "a time for people")]
        let each = second / count.max(1) as f64;
        eprintln!(
            "{count:5} descriptors: {whole:9.0} us, with the guest stopped {second:9.0} us, {each:6.2} us each"
        );
        cases.push(json!({
            "fds": count,
            "whole-us": whole,
            "stopped-us": second,
            "each-us": each,
            "samples": samples,
        }));
    }
    Ok(cases)
}

/// Microseconds for all of it, and for the second stage.
fn hand_over(fds: &[OwnedFd]) -> Result<(f64, f64)> {
    let names: Vec<_> = (0..fds.len()).map(|at| format!("device{at}")).collect();
    let mut handout = Handout::new();
    for (name, fd) in names.iter().zip(fds) {
        handout.add((name, "kick"), FdKind::EventFd, Stage::HandOver, 0, fd)?;
    }
    let mut command = Command::new(std::env::current_exe()?);
    let (mut taker, socket) = spawn::spawn(command.env(BE_TAKER, "1"))?;
    let id = MigrationId([7; 16]);
    let began = Instant::now();
    let prepared = handout.offer(socket, id, "bench", GiverDeadlines::default())?;
    let stopped = Instant::now();
    prepared.hand_over()?;
    let us = |since: Instant| since.elapsed().as_secs_f64() * 1e6;
    let times = (us(began), us(stopped));
    ensure!(taker.wait()?.success(), "the taker has failed");
    Ok(times)
}

/// The other process.
pub(crate) fn take() -> ExitCode {
    let taken = || -> Result<()> {
        let socket = CprSocket::new(spawn::inherited_socket()?)?;
        let offered = Offered::receive(socket, "bench", TakerDeadlines::default())?;
        let names = offered.manifest().of_kind(FdKind::EventFd);
        let names: Vec<_> = names.map(|entry| entry.name.clone()).collect();
        let mut rest = offered.accept()?.taken()?.wait()?;
        let mut fds = Vec::new();
        for name in &names {
            fds.push(rest.claim(name, "kick", FdKind::EventFd)?);
        }
        let done = rest.taken()?.is_done();
        ensure!(done && fds.len() == names.len(), "some are missing");
        Ok(())
    };
    match taken().context("taking descriptors over") {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
