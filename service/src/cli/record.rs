//! What `query-migrate` answers, read as far as it goes: other VMMs and other versions leave out members, and add some.

use serde_json::Value;

use super::style::clean;
use crate::migration::status::MigrationStatus;
use crate::qmp::schema::{BlackoutInfo, SocketAddressInfo};

/// One answer to `query-migrate`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Record(Value);

impl Record {
    pub(super) fn new(answer: Value) -> Self {
        Self(answer)
    }

    /// As it came.
    pub(super) fn json(&self) -> &Value {
        &self.0
    }

    /// Where the migration is. A state that we do not know is one in which it goes on.
    pub(super) fn status(&self) -> MigrationStatus {
        let Some(name) = self.0["status"].as_str() else {
            return MigrationStatus::None;
        };
        let known = MigrationStatus::ALL.into_iter().find(|s| s.name() == name);
        known.unwrap_or(MigrationStatus::Active)
    }

    /// The same as the VM calls it.
    pub(super) fn status_name(&self) -> String {
        clean(self.0["status"].as_str().unwrap_or("none"))
    }

    /// Why it failed, or what is wrong although it goes on.
    pub(super) fn error(&self) -> Option<String> {
        self.0["error-desc"].as_str().map(clean)
    }

    /// Why a migration would be refused.
    pub(super) fn blocked(&self) -> Vec<String> {
        let reasons = self.0["blocked-reasons"].as_array();
        let texts = reasons.into_iter().flatten().filter_map(Value::as_str);
        texts.map(clean).collect()
    }

    /// Where the VM listens.
    pub(super) fn listening(&self) -> Vec<String> {
        let all = self.0["socket-address"].as_array();
        all.into_iter().flatten().map(address).collect()
    }

    /// Milliseconds since the start. The target of a migration counts none.
    pub(super) fn total_ms(&self) -> Option<u64> {
        number(&self.0["total-time"])
    }

    /// The blackout in milliseconds, when it is over.
    pub(super) fn downtime_ms(&self) -> Option<u64> {
        number(&self.0["downtime"])
    }

    /// The blackout in parts.
    pub(super) fn blackout(&self) -> Option<BlackoutInfo> {
        let parts = self.0.get("x-blackout")?;
        serde_json::from_value(parts.clone()).ok()
    }

    /// The blackout in microseconds if the switchover came now.
    pub(super) fn predicted_us(&self) -> Option<u64> {
        let ours = number(&self.0["x-predicted-blackout-us"]);
        // QEMU says the largest number it has where it cannot tell.
        let theirs = number(&self.0["expected-downtime"]).filter(|ms| *ms < i64::MAX as u64);
        ours.or_else(|| theirs.map(|ms| ms.saturating_mul(1000)))
    }

    /// How much the guest is held back, in percent.
    pub(super) fn throttle(&self) -> Option<u64> {
        number(&self.0["cpu-throttle-percentage"]).filter(|percent| *percent > 0)
    }

    /// Which round it is, the first is 1.
    pub(super) fn round(&self) -> u64 {
        let ours = number(&self.0["x-round"]);
        ours.or_else(|| self.ram("dirty-sync-count")).unwrap_or(0)
    }

    /// Data connections, and what moves the bytes.
    pub(super) fn connections(&self) -> Option<(u64, String)> {
        let backend = clean(self.0["x-backend"].as_str()?);
        Some((number(&self.0["x-connections"])?, backend))
    }

    /// Whether there are figures of memory.
    pub(super) fn has_ram(&self) -> bool {
        self.0["ram"].is_object()
    }

    /// A member of `ram`.
    pub(super) fn ram(&self, member: &str) -> Option<u64> {
        number(&self.0["ram"][member])
    }

    /// Bytes dirtied per second.
    pub(super) fn dirtied(&self) -> Option<u64> {
        let page = self.ram("page-size").unwrap_or(4096);
        Some(self.ram("dirty-pages-rate")?.saturating_mul(page))
    }
}

/// A count, whatever it was written as.
fn number(value: &Value) -> Option<u64> {
    if let Some(signed) = value.as_i64() {
        return Some(u64::try_from(signed).unwrap_or(0));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the cast saturates, and the number is only shown"
    )]
    let rounded = |float: f64| float as u64;
    value.as_u64().or_else(|| value.as_f64().map(rounded))
}

fn address(answer: &Value) -> String {
    let ours: Option<SocketAddressInfo> = serde_json::from_value(answer.clone()).ok();
    match ours.and_then(|address| address.to_address().ok()) {
        Some(address) => clean(&address.to_string()),
        // A kind that we have no word for.
        None => clean(&answer.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_missing_or_strange_is_no_failure() {
        for answer in [
            json!({}),
            json!(null),
            json!([]),
            json!({"status": 5, "ram": [], "error-desc": {}, "socket-address": 1, "x-blackout": 7}),
        ] {
            let record = Record::new(answer);
            assert_eq!(record.status(), MigrationStatus::None);
            assert_eq!(record.status_name(), "none");
            assert_eq!((record.round(), record.dirtied()), (0, None));
            assert!(record.listening().is_empty() && record.error().is_none());
            assert_eq!(record.blackout(), None);
        }
        let record = Record::new(json!({
            "status": "warp", "total-time": -5, "expected-downtime": i64::MAX,
            "ram": {"remaining": 1.5e300, "dirty-pages-rate": u64::MAX, "page-size": 4096},
            "socket-address": [{"type": "fd", "str": "5"}, {"type": "unix", "path": "/x"}]
        }));
        assert_eq!(record.status(), MigrationStatus::Active);
        assert_eq!(record.status_name(), "warp");
        assert_eq!(record.total_ms(), Some(0));
        assert_eq!(record.predicted_us(), None);
        assert_eq!(record.ram("remaining"), Some(u64::MAX));
        assert_eq!(record.dirtied(), Some(u64::MAX));
        assert_eq!(record.listening()[1], "unix:/x");
    }

    #[test]
    fn a_reason_cannot_write_elsewhere_on_the_screen() {
        let record = Record::new(json!({"error-desc": "no\x1b[2Jroom"}));
        assert_eq!(record.error().unwrap(), "no [2Jroom");
    }
}
