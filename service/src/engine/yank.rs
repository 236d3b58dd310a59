//! `yank`: an operator gets a migration unstuck whose peer or network does not answer.

use serde_json::json;

use super::Engine;
use super::commands::Answer;
use crate::qmp::{ErrorClass, QmpError, YankInstance};

impl Engine {
    /// What can be yanked: the migration, on the side and for as long as there is one.
    pub(super) fn yank_instances(&self) -> Vec<YankInstance> {
        let incoming = self
            .incoming
            .as_ref()
            .is_some_and(|incoming| !incoming.is_over());
        if self.outgoing.is_some() || incoming {
            vec![YankInstance::Migration]
        } else {
            Vec::new()
        }
    }

    /// Shuts down both directions of every connection of the migration. All or nothing: an instance that is not there changes nothing.
    pub(super) fn yank(&mut self, instances: &[YankInstance]) -> Answer {
        let known = self.yank_instances();
        if let Some(missing) = instances.iter().find(|wanted| !known.contains(wanted)) {
            let desc = match missing {
                YankInstance::Migration => "there is no migration to yank".to_owned(),
                YankInstance::BlockNode { node_name } => {
                    format!("block node `{node_name:.60}` has no connection to yank")
                }
                YankInstance::Chardev { id } => {
                    format!("character device `{id:.60}` has no connection to yank")
                }
            };
            return Err(QmpError {
                class: ErrorClass::DeviceNotFound,
                desc,
            });
        }
        if !instances.is_empty() {
            if let Some(outgoing) = &mut self.outgoing {
                outgoing.yank();
            }
            if let Some(incoming) = &mut self.incoming {
                incoming.yank();
            }
        }
        Ok(json!({}))
    }
}
