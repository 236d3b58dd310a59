//! What somebody who follows a migration wants to know, in words. No terminal and no clock here: times come in.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cli::record::Record;
use crate::cli::size::{Size, duration};
use crate::cli::style::{Tone, columns};
use crate::migration::status::MigrationStatus;

/// Time over which the rate is measured.
const RATE_OVER: Duration = Duration::from_secs(2);
/// Shortest time that gives a rate.
const RATE_AFTER: Duration = Duration::from_millis(150);
/// Silence that is worth a word.
const SILENT_AFTER: Duration = Duration::from_secs(2);

/// A migration at one moment, and what can be told from the moments before.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    record: Record,
    round: u64,
    /// Bytes that this round had at its start, as far as seen.
    round_bytes: u64,
    /// When so many bytes had been sent.
    sent: VecDeque<(Instant, u64)>,
    silence: Duration,
    /// Since when the status is what it is, as far as seen.
    since: Option<Instant>,
    now: Option<Instant>,
    /// Lines about the VM itself, above everything else.
    pub(super) about: Vec<String>,
    /// The same for programs.
    pub(super) guest: Value,
    /// How to reach this VM again, as arguments of this program.
    arguments: String,
}

impl View {
    /// Of the VM behind this socket, which has not answered yet.
    pub(super) fn new(qmp: &Path) -> Self {
        Self {
            arguments: format!("--qmp {}", qmp.display()),
            ..Self::default()
        }
    }

    /// Takes in what the VM answered at `now`.
    pub(super) fn take(&mut self, record: Record, now: Instant) {
        self.silence = Duration::ZERO;
        if self.since.is_none() || record.status() != self.record.status() {
            self.since = Some(now);
        }
        self.now = Some(now);
        let round = record.round();
        if round != self.round {
            self.round = round;
            self.round_bytes = 0;
        }
        self.round_bytes = self.round_bytes.max(record.ram("remaining").unwrap_or(0));
        if let Some(bytes) = record.ram("transferred") {
            // Another migration has begun.
            if self.sent.back().is_some_and(|(_, before)| *before > bytes) {
                self.sent.clear();
            }
            self.sent.push_back((now, bytes));
            while self.sent.len() > 2 && now.duration_since(self.sent[0].0) > RATE_OVER {
                self.sent.pop_front();
            }
        }
        self.record = record;
    }

    /// The VM has not answered for so long.
    pub(super) fn silent(&mut self, how_long: Duration) {
        self.silence = how_long;
    }

    /// The last answer.
    pub(super) fn record(&self) -> &Record {
        &self.record
    }

    /// Everything for programs.
    pub(super) fn json(&self) -> Value {
        let mut all = json!({ "migration": self.record.json() });
        if let (Value::Object(all), Value::Object(guest)) = (&mut all, &self.guest) {
            all.extend(guest.clone());
        }
        all
    }

    /// No migration is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.record.status().is_idle()
    }

    /// Only the target of a migration counts no time.
    fn is_incoming(&self) -> bool {
        self.record.total_ms().is_none() && self.record.status() == MigrationStatus::Active
    }

    /// Bytes per second of late.
    fn rate(&self) -> Option<u64> {
        let ((first, before), (last, after)) = (self.sent.front()?, self.sent.back()?);
        let micros = last.duration_since(*first);
        if micros < RATE_AFTER {
            return None;
        }
        let bytes = u128::from(after.saturating_sub(*before)) * 1_000_000;
        u64::try_from(bytes / micros.as_micros()).ok()
    }

    /// How long the status has been what it is.
    fn so_far(&self) -> Duration {
        let (Some(since), Some(now)) = (self.since, self.now) else {
            return Duration::ZERO;
        };
        now.duration_since(since)
    }

    /// How much of the round is sent; `None` where that is no question.
    pub(super) fn percent(&self) -> Option<u64> {
        match self.record.status() {
            MigrationStatus::None | MigrationStatus::PreSwitchover => return None,
            MigrationStatus::Setup | MigrationStatus::WaitUnplug => return Some(0),
            _ if self.is_incoming() => return None,
            _ => {}
        }
        if self.round_bytes == 0 {
            return Some(if self.round == 0 { 0 } else { 100 });
        }
        let left = self.record.ram("remaining").unwrap_or(0);
        let sent = u128::from(self.round_bytes.saturating_sub(left)) * 100;
        u64::try_from(sent / u128::from(self.round_bytes)).ok()
    }

    /// Where it stands, in a word or two.
    pub(super) fn stage(&self) -> String {
        match self.record.status() {
            MigrationStatus::None => "waiting".to_owned(),
            MigrationStatus::Active if self.is_incoming() => "receiving".to_owned(),
            MigrationStatus::Active if self.round == 0 => "preparing".to_owned(),
            MigrationStatus::Active => format!("round {}", self.round),
            MigrationStatus::Device if self.record.error().is_some() => "in doubt".to_owned(),
            MigrationStatus::Device => "switchover".to_owned(),
            _ => self.record.status_name(),
        }
    }

    /// How the stage is to be taken.
    pub(super) fn tone(&self) -> Tone {
        match self.record.status() {
            MigrationStatus::Completed => Tone::Good,
            MigrationStatus::Failing | MigrationStatus::Failed => Tone::Bad,
            MigrationStatus::Cancelling
            | MigrationStatus::Cancelled
            | MigrationStatus::PreSwitchover
            | MigrationStatus::PostcopyPaused => Tone::Attention,
            _ if self.record.error().is_some() => Tone::Attention,
            _ => Tone::Plain,
        }
    }

    /// Time since the start.
    pub(super) fn elapsed(&self) -> Option<String> {
        let ms = self.record.total_ms()?;
        Some(if ms < 100_000 {
            format!("{}.{} s", ms / 1000, ms % 1000 / 100)
        } else {
            format!("{}:{:02} min", ms / 60_000, ms % 60_000 / 1000)
        })
    }

    /// The figures, in at most so many columns: longer words where there is room, fewer figures where there is not.
    pub(super) fn figures(&self, most: usize) -> String {
        let record = &self.record;
        match record.status() {
            MigrationStatus::None => {
                let at = record.listening().join(", ");
                return match at.is_empty() {
                    true => "no migration so far".to_owned(),
                    false => format!("for a migration at {at}"),
                };
            }
            MigrationStatus::Setup if !record.listening().is_empty() => {
                return format!("waiting at {}", record.listening().join(", "));
            }
            MigrationStatus::Setup => return "connecting, preparing both sides".to_owned(),
            MigrationStatus::WaitUnplug => return "waiting for the guest to unplug".to_owned(),
            MigrationStatus::PreSwitchover => {
                let left = Size(record.ram("remaining").unwrap_or(0));
                let seconds = self.so_far().as_secs();
                return format!("{left} left, the guest stopped {seconds} s ago");
            }
            _ => {}
        }
        let fits = |text: &String| columns(text) <= most;
        let figures = |long| self.list(long);
        let long = figures(true).join(", ");
        if fits(&long) {
            return long;
        }
        let mut short = figures(false);
        while short.len() > 1 && !fits(&short.join(", ")) {
            short.pop();
        }
        short.join(", ")
    }

    /// The figures by importance.
    fn list(&self, long: bool) -> Vec<String> {
        let record = &self.record;
        let mut list = Vec::new();
        if self.is_incoming() {
            let received = record.ram("transferred");
            list.extend(received.map(|bytes| format!("{} received", Size(bytes))));
            list.extend(self.rate().map(|rate| format!("{}/s", Size(rate))));
            if list.is_empty() {
                list.push("this VM tells no figures while it receives".to_owned());
            }
            return list;
        }
        if !record.has_ram() {
            return list;
        }
        let left = record.ram("remaining").unwrap_or(0);
        list.push(format!("{} left", Size(left)));
        list.extend(self.rate().map(|rate| format!("{}/s", Size(rate))));
        if record.status() == MigrationStatus::Device {
            // The guest stands still, and what was predicted happens.
            return list;
        }
        // Before the first fetch of the dirty log nothing is known.
        let known = |bytes: &u64| *bytes > 0 || self.round > 1;
        if let Some(dirtied) = record.dirtied().filter(known) {
            let word = if long { "dirtied" } else { "dirty" };
            list.push(format!("{word} {}/s", Size(dirtied)));
        }
        if let Some(us) = record.predicted_us() {
            let word = if long {
                "predicted blackout"
            } else {
                "blackout ~"
            };
            list.push(format!("{word} {}", duration(us)));
        }
        if let Some(percent) = record.throttle() {
            let word = if long { "guest throttled" } else { "throttle" };
            list.push(format!("{word} {percent}%"));
        }
        list
    }

    /// What somebody has to know or do, if there is such a thing: some lines, commands on lines of their own.
    pub(super) fn notice(&self) -> Option<(Tone, Vec<String>)> {
        let Self { arguments, .. } = self;
        if self.silence >= SILENT_AFTER {
            let seconds = self.silence.as_secs();
            let text = format!("the VM has not answered for {seconds} s; the figures are old");
            return Some((Tone::Attention, vec![text]));
        }
        let error = self.record.error();
        let attention = |lines| Some((Tone::Attention, lines));
        match self.record.status() {
            MigrationStatus::PreSwitchover => attention(vec![
                "the guest is stopped and waits for you; Ctrl-C asks, or say".to_owned(),
                format!("go on:  vmferry continue {arguments}"),
                format!("back:   vmferry cancel {arguments}"),
            ]),
            MigrationStatus::PostcopyPaused => {
                let reason = error.unwrap_or_else(|| "the link is gone".to_owned());
                attention(vec![format!("{reason}; both sides keep what they have")])
            }
            MigrationStatus::Device => attention(vec![
                error?,
                "if the target runs the guest:".to_owned(),
                format!("vmferry resolve {arguments} target-runs"),
                "if it does not, and its process is gone for good:".to_owned(),
                format!("vmferry resolve {arguments} source-runs"),
            ]),
            MigrationStatus::Failing => Some((Tone::Bad, vec![error?])),
            MigrationStatus::Completed | MigrationStatus::Failed | MigrationStatus::Cancelled => {
                None
            }
            _ => attention(vec![error?]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn active(round: u64, remaining: u64, transferred: u64) -> Value {
        json!({
            "status": "active", "x-round": round, "x-predicted-blackout-us": 12_300, "total-time": 12_345,
            "ram": {"remaining": remaining, "transferred": transferred, "dirty-pages-rate": 256, "page-size": 4096}
        })
    }

    /// A view that has seen these answers, half a second apart.
    fn view(answers: &[Value]) -> View {
        let (mut view, mut now) = (View::new(Path::new("/s")), Instant::now());
        for answer in answers {
            view.take(Record::new(answer.clone()), now);
            now += Duration::from_millis(500);
        }
        view
    }

    #[test]
    fn progress_is_that_of_the_round() {
        let first = active(1, 200 << 20, 0);
        let mut seen = vec![first];
        assert_eq!(
            (view(&seen).stage().as_str(), view(&seen).percent()),
            ("round 1", Some(0))
        );
        seen.push(active(1, 50 << 20, 150 << 20));
        assert_eq!(view(&seen).percent(), Some(75));
        assert_eq!(
            view(&seen).figures(79),
            "50 MiB left, 300 MiB/s, dirtied 1 MiB/s, predicted blackout 12.3 ms"
        );
        seen.push(active(2, 10 << 20, 200 << 20));
        assert_eq!(
            (view(&seen).stage().as_str(), view(&seen).percent()),
            ("round 2", Some(0))
        );
        seen.push(active(2, 0, 210 << 20));
        assert_eq!(view(&seen).percent(), Some(100));
        assert_eq!(view(&seen).elapsed().unwrap(), "12.3 s");
    }

    #[test]
    fn figures_that_do_not_fit_are_left_out_from_the_end() {
        let mut answer = active(1, (612 << 20) + 5000, 0);
        answer["cpu-throttle-percentage"] = json!(40);
        let view = view(&[answer]);
        assert_eq!(
            view.figures(90),
            "612 MiB left, dirtied 1 MiB/s, predicted blackout 12.3 ms, guest throttled 40%"
        );
        assert_eq!(
            view.figures(77),
            "612 MiB left, dirty 1 MiB/s, blackout ~ 12.3 ms, throttle 40%"
        );
        assert_eq!(
            view.figures(50),
            "612 MiB left, dirty 1 MiB/s, blackout ~ 12.3 ms"
        );
        assert_eq!(view.figures(5), "612 MiB left");
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let mut seen = vec![active(1, 5, 0)];
        for _ in 0..20 {
            seen.push(active(1, 5, 1 << 30));
        }
        assert_eq!(view(&seen).rate(), Some(0));
        // A new migration counts from the start again.
        seen.push(active(1, 5, 7));
        assert_eq!(view(&seen).rate(), None);
    }

    #[test]
    fn an_answer_of_qemu_is_enough() {
        let view_of = |answer| view(&[answer]);
        assert_eq!(
            view_of(json!({"status": "setup"})).figures(79),
            "connecting, preparing both sides"
        );
        let source = view_of(json!({
            "status": "active", "expected-downtime": 300, "total-time": 5,
            "ram": {"remaining": 5, "dirty-sync-count": 3, "mbps": 1e300, "dirty-pages-rate": u64::MAX, "page-size": 4096}
        }));
        assert_eq!(source.stage(), "round 3");
        assert!(source.figures(200).contains("predicted blackout 300 ms"));
        let target = view_of(json!({"status": "active"}));
        assert_eq!(
            (target.stage().as_str(), target.percent()),
            ("receiving", None)
        );
        assert_eq!(
            target.figures(79),
            "this VM tells no figures while it receives"
        );
    }

    #[test]
    fn a_target_tells_where_it_waits_and_what_came() {
        let address = json!([{"type": "inet", "host": "::1", "port": "4444"}]);
        let view_of = |answer| view(&[answer]);
        let waiting = view_of(json!({"socket-address": address.clone()}));
        assert_eq!(waiting.stage(), "waiting");
        assert_eq!(waiting.figures(79), "for a migration at tcp:[::1]:4444");
        let qemu = view_of(json!({"status": "setup", "socket-address": address}));
        assert_eq!(qemu.figures(79), "waiting at tcp:[::1]:4444");
        let receiving = view_of(json!({"status": "active", "ram": {"transferred": 5 << 20}}));
        assert_eq!(receiving.figures(79), "5 MiB received");
        assert_eq!(view_of(json!({})).figures(79), "no migration so far");
    }

    #[test]
    fn who_has_to_do_something_is_told_what() {
        let notice = |answer| view(&[answer]).notice();
        let (_, text) = notice(json!({"status": "pre-switchover"})).unwrap();
        assert_eq!(text[1], "go on:  vmferry continue --qmp /s");
        let (_, text) = notice(json!({"status": "device", "error-desc": "nobody knows"})).unwrap();
        assert_eq!(text[0], "nobody knows");
        assert_eq!(text[2], "vmferry resolve --qmp /s target-runs");
        assert_eq!(notice(json!({"status": "device"})), None);
        let failing = notice(json!({"status": "failing", "error-desc": "no room"}));
        assert_eq!(failing, Some((Tone::Bad, vec!["no room".to_owned()])));
        // The end is told below.
        assert_eq!(
            notice(json!({"status": "failed", "error-desc": "no room"})),
            None
        );
    }

    #[test]
    fn a_guest_that_stands_still_is_counted_in_seconds() {
        let waiting =
            json!({"status": "pre-switchover", "total-time": 5, "ram": {"remaining": 1 << 20}});
        let seen = view(&[active(1, 5, 0), waiting.clone(), waiting.clone(), waiting]);
        assert_eq!(seen.figures(79), "1 MiB left, the guest stopped 1 s ago");
        assert_eq!(seen.percent(), None);
    }

    #[test]
    fn silence_is_told() {
        let mut view = view(&[active(1, 5, 0)]);
        view.silent(Duration::from_secs(1));
        assert_eq!(view.notice(), None);
        view.silent(Duration::from_secs(7));
        assert!(view.notice().unwrap().1[0].contains("for 7 s"));
    }
}
