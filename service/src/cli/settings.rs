//! `vmferry set` and `vmferry capabilities`: how migrations are done, in people's units.

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Map, Value, json};

use super::client::QmpClient;
use super::exit::Exit;
use super::size::Size;
use super::style::{Colours, Tone, clean};
use super::{QmpArgs, output};
use crate::migration::params::CapabilityStatus;

/// Parameters that count bytes, and whether per second.
const BYTES: [(&str, bool); 5] = [
    ("avail-switchover-bandwidth", true),
    ("max-bandwidth", true),
    ("max-postcopy-bandwidth", true),
    ("x-rdma-chunk-size", false),
    ("xbzrle-cache-size", false),
];
/// Parameters that count milliseconds.
const MILLISECONDS: [&str; 6] = [
    "announce-initial",
    "announce-max",
    "announce-step",
    "downtime-limit",
    "x-checkpoint-delay",
    "x-vcpu-dirty-limit-period",
];
/// Parameters of which 0 means that there is no limit.
const ZERO_IS_UNLIMITED: [&str; 2] = ["max-bandwidth", "max-postcopy-bandwidth"];

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    vmferry set --qmp /tmp/source.qmp\n  \
    vmferry set --qmp /tmp/source.qmp max-bandwidth=100M downtime-limit=300ms multifd-channels=4\n\n\
    Sizes take K, M, G or T (binary), times ms or s, switches on or off. All are set or\n\
    none. Without NAME=VALUE it shows what is set.")]
pub(super) struct SetArgs {
    #[command(flatten)]
    vm: QmpArgs,
    /// Print all parameters as the VM names and counts them, as JSON
    #[arg(long)]
    json: bool,
    /// Migration parameters to set
    #[arg(value_name = "NAME=VALUE", value_parser = parse_pair)]
    settings: Vec<(String, String)>,
}

impl SetArgs {
    pub(super) fn execute(self) -> anyhow::Result<Exit> {
        let mut client = QmpClient::connect(&self.vm.qmp)?;
        let before = parameters(&mut client)?;
        if self.settings.is_empty() {
            show(&before, self.json)?;
            return Ok(Exit::Done);
        }
        let mut wanted = Map::new();
        for (name, text) in &self.settings {
            let now = before.get(name);
            if now.is_none() && !text.starts_with(['[', '{']) {
                bail!(
                    "{}",
                    unknown(&client.name(), "parameter", name, before.keys())
                );
            }
            let value = value(name, text, now).with_context(|| format!("{name}={text}"))?;
            if wanted.insert(name.clone(), value).is_some() {
                bail!("`{name}` is given twice");
            }
        }
        let changed: Vec<_> = wanted.keys().cloned().collect();
        client.execute("migrate-set-parameters", Value::Object(wanted))?;
        let after = parameters(&mut client)?;
        if self.json {
            show(&after, true)?;
            return Ok(Exit::Done);
        }
        for name in changed {
            let shown = |all: &Map<String, Value>| all.get(&name).map(|value| human(&name, value));
            let was = shown(&before).unwrap_or_else(|| "unset".to_owned());
            let is = shown(&after).unwrap_or_else(|| "unset".to_owned());
            output::line(format_args!("{name} = {is} (was {was})"))?;
        }
        Ok(Exit::Done)
    }
}

fn parameters(client: &mut QmpClient) -> anyhow::Result<Map<String, Value>> {
    Ok(client.query("query-migrate-parameters")?)
}

fn show(all: &Map<String, Value>, json: bool) -> anyhow::Result<()> {
    if json {
        output::line(format_args!("{:#}", json!(all)))?;
        return Ok(());
    }
    let mut names: Vec<_> = all.keys().collect();
    names.sort();
    let width = names.iter().map(|name| name.len()).max().unwrap_or(0);
    for name in names {
        output::line(format_args!(
            "{:<width$}  {}",
            clean(name),
            human(name, &all[name])
        ))?;
    }
    Ok(())
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

/// What `text` means for a parameter that is `now` so in the VM.
fn value(name: &str, text: &str, now: Option<&Value>) -> anyhow::Result<Value> {
    Ok(match now {
        Some(Value::Bool(_)) => json!(switch(text)?),
        Some(Value::Number(_)) if BYTES.iter().any(|(known, _)| *known == name) => {
            json!(bytes(text)?)
        }
        Some(Value::Number(_)) if MILLISECONDS.contains(&name) => json!(milliseconds(text)?),
        Some(Value::Number(_)) => json!(text.parse::<u64>().context("this takes a whole number")?),
        Some(Value::String(_)) => json!(text),
        _ => serde_json::from_str(text).context("this takes JSON")?,
    })
}

/// A size as people write it and as it is shown.
fn bytes(text: &str) -> anyhow::Result<u64> {
    let plain = text
        .trim_end_matches("/s")
        .trim_end_matches("iB")
        .trim_end_matches('B');
    let size: Size = plain.replace(' ', "").parse().map_err(anyhow::Error::msg)?;
    Ok(size.0)
}

fn milliseconds(text: &str) -> anyhow::Result<u64> {
    let (digits, factor) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(digits), _) => (digits, 1),
        (None, Some(digits)) => (digits, 1000),
        (None, None) => (text, 1),
    };
    let number: Option<u64> = digits.trim_end().parse().ok();
    number
        .and_then(|number| number.checked_mul(factor))
        .context("this takes milliseconds like 300ms, or seconds like 2s")
}

fn switch(text: &str) -> anyhow::Result<bool> {
    match text.to_ascii_lowercase().as_str() {
        "on" | "true" | "yes" => Ok(true),
        "off" | "false" | "no" => Ok(false),
        _ => bail!("this takes on or off"),
    }
}

/// A value with its unit.
fn human(name: &str, value: &Value) -> String {
    let number = value.as_u64();
    match (value, number) {
        (_, Some(0)) if ZERO_IS_UNLIMITED.contains(&name) => "0 (no limit)".to_owned(),
        (_, Some(number)) => {
            if let Some((_, per_second)) = BYTES.iter().find(|(known, _)| *known == name) {
                let per_second = if *per_second { "/s" } else { "" };
                format!("{}{per_second}", Size(number))
            } else if MILLISECONDS.contains(&name) {
                format!("{number} ms")
            } else {
                number.to_string()
            }
        }
        (Value::Bool(on), _) => (if *on { "on" } else { "off" }).to_owned(),
        (Value::String(text), _) if text.is_empty() => "(empty)".to_owned(),
        (Value::String(text), _) => clean(text),
        (other, _) => clean(&other.to_string()),
    }
}

/// Who knows what instead.
fn unknown<'a>(
    vm: &str,
    kind: &str,
    name: &str,
    known: impl Iterator<Item = &'a String>,
) -> String {
    let mut known: Vec<_> = known.map(|name| clean(name)).collect();
    known.sort();
    format!(
        "this VM ({vm}) has no migration {kind} `{name}`; it has {}",
        known.join(", ")
    )
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    vmferry capabilities --qmp /tmp/source.qmp\n  \
    vmferry capabilities --qmp /tmp/source.qmp pause-before-switchover=on auto-converge=off\n\n\
    All are changed or none. Most have to be the same on both sides.")]
pub(super) struct CapabilitiesArgs {
    #[command(flatten)]
    vm: QmpArgs,
    /// Print all capabilities as JSON
    #[arg(long)]
    json: bool,
    /// Capabilities to switch
    #[arg(value_name = "NAME=on|off", value_parser = parse_switch)]
    changes: Vec<(String, bool)>,
}

impl CapabilitiesArgs {
    pub(super) fn execute(self) -> anyhow::Result<Exit> {
        let mut client = QmpClient::connect(&self.vm.qmp)?;
        let before = capabilities(&mut client)?;
        let names = || before.iter().map(|known| &known.capability);
        for (name, _) in &self.changes {
            if !names().any(|known| known == name) {
                bail!("{}", unknown(&client.name(), "capability", name, names()));
            }
        }
        if !self.changes.is_empty() {
            let changes: Vec<_> = self
                .changes
                .iter()
                .map(|(name, state)| json!({ "capability": name, "state": state }))
                .collect();
            client.execute(
                "migrate-set-capabilities",
                json!({ "capabilities": changes }),
            )?;
        }
        let mut after = capabilities(&mut client)?;
        if self.json {
            output::line(format_args!("{:#}", json!(after)))?;
            return Ok(Exit::Done);
        }
        after.sort_by(|a, b| a.capability.cmp(&b.capability));
        let colours = Colours::of_stdout();
        for CapabilityStatus { capability, state } in &after {
            let asked =
                self.changes.is_empty() || self.changes.iter().any(|(name, _)| name == capability);
            if asked {
                let word = if *state {
                    colours.paint(Tone::Good, "on ")
                } else {
                    colours.paint(Tone::Faint, "off")
                };
                output::line(format_args!("{word}  {}", clean(capability)))?;
            }
        }
        Ok(Exit::Done)
    }
}

fn capabilities(client: &mut QmpClient) -> anyhow::Result<Vec<CapabilityStatus>> {
    Ok(client.query("query-migrate-capabilities")?)
}

fn parse_switch(text: &str) -> Result<(String, bool), String> {
    let (name, value) = parse_pair(text).map_err(|_| "write NAME=on or NAME=off".to_owned())?;
    let on = switch(&value).map_err(|_| "write NAME=on or NAME=off".to_owned())?;
    Ok((name, on))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_what_they_are_now() {
        let number = json!(5);
        for (name, text, now, wanted) in [
            ("max-bandwidth", "100M", &number, json!(100 << 20)),
            ("max-bandwidth", "954 MiB/s", &number, json!(954 << 20)),
            ("xbzrle-cache-size", "64M", &number, json!(64 << 20)),
            ("downtime-limit", "300", &number, json!(300)),
            ("downtime-limit", "300ms", &number, json!(300)),
            ("downtime-limit", "2s", &number, json!(2000)),
            ("multifd-channels", "4", &number, json!(4)),
            ("x-verify", "on", &json!(false), json!(true)),
            ("tls-creds", "5", &json!(""), json!("5")),
        ] {
            assert_eq!(
                value(name, text, Some(now)).unwrap(),
                wanted,
                "{name}={text}"
            );
        }
        let list = value("cpr-exec-command", "[\"/bin/vmferry\"]", None).unwrap();
        assert_eq!(list, json!(["/bin/vmferry"]));
    }

    #[test]
    fn values_that_mean_nothing_are_refused_with_what_is_taken() {
        for (name, text, now, part) in [
            ("max-bandwidth", "fast", json!(5), "like 512M"),
            ("downtime-limit", "5 minutes", json!(5), "like 300ms"),
            (
                "downtime-limit",
                "99999999999999999999s",
                json!(5),
                "like 300ms",
            ),
            ("multifd-channels", "4M", json!(5), "a whole number"),
            ("multifd-channels", "-1", json!(5), "a whole number"),
            ("x-verify", "1", json!(true), "on or off"),
        ] {
            let error = format!("{:#}", value(name, text, Some(&now)).unwrap_err());
            assert!(error.contains(part), "{name}={text}: {error}");
        }
        assert!(parse_pair("downtime-limit").is_err() && parse_pair("=5").is_err());
        assert!(parse_switch("events=maybe").is_err());
        assert_eq!(parse_switch("events=on"), Ok(("events".to_owned(), true)));
    }

    #[test]
    fn values_are_shown_with_their_units() {
        for (name, shown, text) in [
            ("max-bandwidth", json!(100 << 20), "100 MiB/s"),
            ("max-bandwidth", json!(0), "0 (no limit)"),
            ("downtime-limit", json!(0), "0 ms"),
            ("multifd-channels", json!(2), "2"),
            ("x-verify", json!(true), "on"),
            ("tls-creds", json!(""), "(empty)"),
            ("mode", json!("normal"), "normal"),
            ("block-bitmap-mapping", json!([{"a": 1}]), "[{\"a\":1}]"),
        ] {
            assert_eq!(human(name, &shown), text);
        }
    }
}
