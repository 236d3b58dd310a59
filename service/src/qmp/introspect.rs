//! `query-qmp-schema`: the command table and the event table in QEMU's form of introspection data.
//!
//! As in QEMU, types other than the built-in ones have names without meaning; clients follow them from commands and events. Types that
//! look the same are one.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::catalog::EVENTS;
use super::dispatch::COMMANDS;
use super::types::{NOTHING, Object, Type, Variants, object};

/// The built-in types with their JSON types.
const BUILT_IN: [(&str, &str); 6] = [
    ("str", "string"),
    ("int", "int"),
    ("number", "number"),
    ("bool", "boolean"),
    ("null", "null"),
    ("any", "value"),
];

/// The answer.
pub(super) fn schema() -> Value {
    let mut types = Types::default();
    let mut lines = Vec::new();
    for command in COMMANDS {
        let mut line = json!({
            "name": command.name,
            "meta-type": "command",
            "arg-type": types.object(&command.arguments),
            "ret-type": match &command.returns {
                Some(kind) => types.name(kind),
                None => types.object(&NOTHING),
            },
        });
        if command.oob {
            line["allow-oob"] = json!(true);
        }
        lines.push(line);
    }
    for event in EVENTS {
        let data = types.object(&object(event.data));
        lines.push(json!({ "name": event.name, "meta-type": "event", "arg-type": data }));
    }
    for (name, json_type) in BUILT_IN {
        lines.push(json!({ "name": name, "meta-type": "builtin", "json-type": json_type }));
    }
    lines.extend(types.lines);
    Value::Array(lines)
}

/// The types met so far.
#[derive(Default)]
struct Types {
    /// By what they look like without their name.
    names: HashMap<String, String>,
    lines: Vec<Value>,
}

impl Types {
    /// The name of a type, which is described if it was not yet.
    fn name(&mut self, kind: &Type) -> String {
        match kind {
            Type::Int => "int".to_owned(),
            Type::Number => "number".to_owned(),
            Type::Bool => "bool".to_owned(),
            Type::Str => "str".to_owned(),
            Type::Any => "any".to_owned(),
            Type::StrOrNull => self.add(json!({
                "meta-type": "alternate", "members": [{ "type": "str" }, { "type": "null" }],
            })),
            Type::List(element) => {
                let element = self.name(element);
                let name = format!("[{element}]");
                let line = json!({ "meta-type": "array", "element-type": element });
                self.add_as(line, name)
            }
            Type::Enum(words) => {
                let words = words();
                let members: Vec<_> = words.iter().map(|word| json!({ "name": word })).collect();
                self.add(json!({ "meta-type": "enum", "members": members, "values": words }))
            }
            Type::Object(object) => self.object(object),
        }
    }

    fn object(&mut self, object: &Object) -> String {
        let mut members: Vec<_> = object
            .members()
            .iter()
            .map(|member| {
                let mut line = json!({ "name": member.name, "type": self.name(&member.kind) });
                if member.optional {
                    line["default"] = Value::Null;
                }
                line
            })
            .collect();
        let mut line = Map::new();
        line.insert("meta-type".to_owned(), json!("object"));
        if let Some(Variants { tag, cases }) = &object.variants {
            let variants: Vec<_> = cases
                .iter()
                .map(|(case, more)| json!({ "case": case, "type": self.object(more) }))
                .collect();
            line.insert("tag".to_owned(), json!(tag));
            line.insert("variants".to_owned(), json!(variants));
        }
        members.sort_by_key(|member| member["name"].to_string());
        line.insert("members".to_owned(), json!(members));
        self.add(Value::Object(line))
    }

    fn add(&mut self, line: Value) -> String {
        let name = self.names.len().to_string();
        self.add_as(line, name)
    }

    fn add_as(&mut self, mut line: Value, name: String) -> String {
        let shape = line.to_string();
        if let Some(known) = self.names.get(&shape) {
            return known.clone();
        }
        line["name"] = json!(name);
        self.lines.push(line);
        self.names.insert(shape, name.clone());
        name
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::qmp::catalog::SCHEMA_INFO;

    fn find<'a>(schema: &'a Value, name: &str) -> &'a Value {
        let mut lines = schema.as_array().unwrap().iter();
        lines
            .find(|line| line["name"] == name)
            .unwrap_or_else(|| panic!("no {name}"))
    }

    /// The type of a member of an object type.
    fn member<'a>(schema: &'a Value, kind: &Value, name: &str) -> &'a Value {
        let object = find(schema, kind.as_str().unwrap());
        let mut members = object["members"].as_array().unwrap().iter();
        let member = members.find(|member| member["name"] == name).unwrap();
        find(schema, member["type"].as_str().unwrap())
    }

    #[test]
    fn the_answer_is_of_the_type_that_it_declares() {
        let list = Type::List(&SCHEMA_INFO);
        assert_eq!(list.check("schema", &schema()), Ok(()));
    }

    #[test]
    fn names_are_unique_and_every_type_that_is_named_is_there() {
        fn named<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
            match value {
                Value::Object(members) => {
                    for (name, value) in members {
                        match (name.as_str(), value) {
                            (
                                "arg-type" | "ret-type" | "element-type" | "type",
                                Value::String(kind),
                            ) => found.push(kind),
                            _ => named(value, found),
                        }
                    }
                }
                Value::Array(items) => items.iter().for_each(|item| named(item, found)),
                _ => {}
            }
        }
        let schema = schema();
        let lines = schema.as_array().unwrap();
        let names: HashSet<_> = lines
            .iter()
            .map(|line| line["name"].as_str().unwrap())
            .collect();
        assert_eq!(names.len(), lines.len());
        let mut used = Vec::new();
        named(&schema, &mut used);
        assert!(used.len() > 100);
        for name in used {
            assert!(names.contains(name), "{name}");
        }
    }

    #[test]
    fn clients_that_probe_for_features_find_them() {
        let schema = schema();
        let set = find(&schema, "migrate-set-parameters");
        let compression = member(&schema, &set["arg-type"], "multifd-compression");
        assert_eq!(compression["meta-type"], "enum");
        assert!(
            compression["values"]
                .as_array()
                .unwrap()
                .contains(&json!("zstd"))
        );
        let threshold = member(&schema, &set["arg-type"], "throttle-trigger-threshold");
        assert_eq!(threshold["json-type"], "int");
        let tls = member(&schema, &set["arg-type"], "tls-creds");
        assert_eq!(tls["meta-type"], "alternate");

        let migrate = find(&schema, "migrate");
        let channels = member(&schema, &migrate["arg-type"], "channels");
        assert_eq!(channels["meta-type"], "array");
        let address = member(&schema, &channels["element-type"], "addr");
        assert_eq!(address["tag"], "transport");
        assert_eq!(address["variants"].as_array().unwrap().len(), 4);

        let info = &find(&schema, "query-migrate")["ret-type"];
        let statuses = &member(&schema, info, "status")["values"];
        assert_eq!(statuses.as_array().unwrap().len(), 17);

        assert_eq!(find(&schema, "yank")["allow-oob"], true);
        assert_eq!(find(&schema, "stop").get("allow-oob"), None);
        let event = find(&schema, "MIGRATION");
        assert_eq!(event["meta-type"], "event");
        assert_eq!(
            member(&schema, &event["arg-type"], "status")["values"],
            *statuses
        );
    }

    #[test]
    fn optional_members_have_a_default_as_in_qemu() {
        let schema = schema();
        let kind = find(&schema, "migrate-incoming")["arg-type"].clone();
        for line in find(&schema, kind.as_str().unwrap())["members"]
            .as_array()
            .unwrap()
        {
            assert_eq!(line.get("default"), Some(&Value::Null));
        }
        let kind = find(&schema, "getfd")["arg-type"].clone();
        assert_eq!(
            find(&schema, kind.as_str().unwrap())["members"][0].get("default"),
            None
        );
    }
}
