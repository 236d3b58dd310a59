//! The states of a migration, by QEMU's names. The table of legal changes is in the transport crate, beside the core that makes them.

pub use vmferry_transport::proto::MigrationStatus;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_the_one_on_the_wire() {
        for status in MigrationStatus::ALL {
            let json = serde_json::to_value(status).unwrap();
            assert_eq!(json, status.name());
            assert_eq!(
                serde_json::from_value::<MigrationStatus>(json).unwrap(),
                status
            );
        }
    }
}
