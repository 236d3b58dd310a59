//! The types of arguments and answers, as data: one description checks what clients send, and tells clients what there is
//! (`query-qmp-schema`).

use serde_json::{Map, Value};

use crate::migration::params::PARAMETERS;
use crate::migration::params::Shape;

/// A type of QMP.
#[derive(Clone, Copy, Debug)]
pub(super) enum Type {
    /// A signed integer of 64 bits, or an unsigned one.
    Int,
    /// Any number.
    Number,
    /// True or false.
    Bool,
    /// A string.
    Str,
    /// A string or null.
    StrOrNull,
    /// Anything.
    Any,
    /// A list.
    List(&'static Type),
    /// One of some words.
    Enum(fn() -> Vec<&'static str>),
    /// An object.
    Object(&'static Object),
}

/// The members of an object.
#[derive(Debug)]
pub(super) struct Object {
    /// Those that do not depend on others.
    pub(super) members: Members,
    /// Those that depend on the value of one of them.
    pub(super) variants: Option<Variants>,
}

#[derive(Debug)]
pub(super) enum Members {
    /// These.
    Fixed(&'static [Member]),
    /// The migration parameters, all optional; those that QEMU knows and we do not support included.
    Parameters,
}

/// One member.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) name: &'static str,
    pub(super) kind: Type,
    pub(super) optional: bool,
}

#[derive(Debug)]
pub(super) struct Variants {
    /// The member that decides.
    pub(super) tag: &'static str,
    /// What its values add. A value that is not here adds nothing.
    pub(super) cases: &'static [(&'static str, &'static Object)],
}

/// An object without members.
pub(super) const NOTHING: Object = object(&[]);

/// An object with just these members.
pub(super) const fn object(members: &'static [Member]) -> Object {
    Object {
        members: Members::Fixed(members),
        variants: None,
    }
}

/// A member that must be there.
pub(super) const fn needs(name: &'static str, kind: Type) -> Member {
    Member {
        name,
        kind,
        optional: false,
    }
}

/// A member that may be left out.
pub(super) const fn may(name: &'static str, kind: Type) -> Member {
    Member {
        name,
        kind,
        optional: true,
    }
}

impl Object {
    /// The members that do not depend on others.
    pub(super) fn members(&self) -> Vec<Member> {
        match self.members {
            Members::Fixed(members) => members.to_vec(),
            Members::Parameters => PARAMETERS
                .iter()
                .map(|parameter| may(parameter.name, parameter_type(parameter.shape)))
                .collect(),
        }
    }

    /// The members that `given` may have, going by what it says it is.
    fn members_of(&self, given: &Map<String, Value>) -> Vec<Member> {
        let mut members = self.members();
        if let Some(Variants { tag, cases }) = &self.variants {
            let value = given.get(*tag).and_then(Value::as_str);
            let case = cases.iter().find(|(name, _)| Some(*name) == value);
            members.extend(
                case.map(|(_, more)| more.members_of(given))
                    .unwrap_or_default(),
            );
        }
        members
    }

    /// Whether `given` is such an object; `path` leads to it, empty at the top.
    ///
    /// # Errors
    /// What is missing, too much, or of another type, by its path.
    pub(super) fn check(&self, path: &str, given: &Map<String, Value>) -> Result<(), String> {
        let members = self.members_of(given);
        for member in &members {
            let at = join(path, member.name);
            match given.get(member.name) {
                Some(value) => member.kind.check(&at, value)?,
                None if member.optional => {}
                None => return Err(format!("`{at}` is missing")),
            }
        }
        match given
            .keys()
            .find(|name| members.iter().all(|member| member.name != name.as_str()))
        {
            None => Ok(()),
            Some(name) => {
                const SHOWN: usize = 60;
                let name: String = name.chars().take(SHOWN).collect();
                Err(format!("`{}` is unknown", join(path, &name)))
            }
        }
    }
}

impl Type {
    /// Whether `value` is of this type.
    ///
    /// # Errors
    /// What is wrong where.
    pub(super) fn check(&self, path: &str, value: &Value) -> Result<(), String> {
        let expected = |what: &str| Err(format!("`{path}` must be {what}"));
        match (self, value) {
            (Self::Any, _) | (Self::Number, Value::Number(_)) | (Self::Bool, Value::Bool(_)) => {
                Ok(())
            }
            (Self::Int, Value::Number(number)) if number.is_i64() || number.is_u64() => Ok(()),
            (Self::Str | Self::StrOrNull, Value::String(_)) => Ok(()),
            (Self::StrOrNull, Value::Null) => Ok(()),
            (Self::List(kind), Value::Array(items)) => items
                .iter()
                .enumerate()
                .try_for_each(|(index, item)| kind.check(&format!("{path}[{index}]"), item)),
            (Self::Enum(words), Value::String(word)) => {
                let words = words();
                if words.contains(&word.as_str()) {
                    return Ok(());
                }
                const SHOWN: usize = 60;
                let word: String = word.chars().take(SHOWN).collect();
                Err(format!(
                    "`{path}`: `{word}` is none of {}",
                    words.join(", ")
                ))
            }
            (Self::Object(object), Value::Object(members)) => object.check(path, members),
            (Self::Int, _) => expected("an integer"),
            (Self::Number, _) => expected("a number"),
            (Self::Bool, _) => expected("true or false"),
            (Self::Str | Self::Enum(_), _) => expected("a string"),
            (Self::StrOrNull, _) => expected("a string or null"),
            (Self::List(_), _) => expected("a list"),
            (Self::Object(_), _) => expected("an object"),
        }
    }
}

/// The type of a parameter as QMP describes it; ranges are not part of that.
fn parameter_type(shape: Shape) -> Type {
    match shape {
        Shape::Integer { .. } => Type::Int,
        Shape::Boolean => Type::Bool,
        Shape::Choice(words) => Type::Enum(words),
        Shape::TextOrNull => Type::StrOrNull,
        Shape::Texts => Type::List(&Type::Str),
        Shape::Anything => Type::List(&Type::Any),
    }
}

fn join(path: &str, name: &str) -> String {
    match path {
        "" => name.to_owned(),
        _ => format!("{path}.{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn colours() -> Vec<&'static str> {
        vec!["red", "blue"]
    }

    const CAR: Object = object(&[
        needs("doors", Type::Int),
        may("colour", Type::Enum(colours)),
    ]);
    const BIKE: Object = object(&[may("bell", Type::Bool)]);
    const VEHICLE: Object = Object {
        members: Members::Fixed(&[
            needs("kind", Type::Str),
            may("names", Type::List(&Type::StrOrNull)),
            may("parts", Type::List(&Type::Object(&BIKE))),
            may("price", Type::Number),
            may("note", Type::Any),
        ]),
        variants: Some(Variants {
            tag: "kind",
            cases: &[("car", &CAR), ("bike", &BIKE)],
        }),
    };

    fn check(value: Value) -> Result<(), String> {
        VEHICLE.check("", value.as_object().unwrap())
    }

    #[test]
    fn what_fits_is_accepted() {
        for value in [
            json!({"kind": "car", "doors": -3, "colour": "red"}),
            json!({"kind": "bike"}),
            json!({"kind": "bike", "bell": true, "names": ["a", null], "parts": [{}, {"bell": false}]}),
            json!({"kind": "boat", "price": 1.5, "note": [[{}]]}),
            json!({"kind": "boat", "price": u64::MAX}),
        ] {
            assert_eq!(check(value.clone()), Ok(()), "{value}");
        }
    }

    #[test]
    fn what_does_not_is_named_by_its_path() {
        for (value, text) in [
            (json!({}), "`kind` is missing"),
            (json!({"kind": 1}), "`kind` must be a string"),
            (json!({"kind": "car"}), "`doors` is missing"),
            (
                json!({"kind": "car", "doors": 1.5}),
                "`doors` must be an integer",
            ),
            (
                json!({"kind": "car", "doors": 1, "colour": "green"}),
                "`colour`: `green` is none of red, blue",
            ),
            (json!({"kind": "bike", "doors": 1}), "`doors` is unknown"),
            (
                json!({"kind": "boat", "names": ["a", 2]}),
                "`names[1]` must be a string or null",
            ),
            (
                json!({"kind": "boat", "parts": [{"bell": true}, {"bell": 1}]}),
                "`parts[1].bell` must be true or false",
            ),
            (
                json!({"kind": "boat", "parts": [{"horn": 1}]}),
                "`parts[0].horn` is unknown",
            ),
            (
                json!({"kind": "boat", "parts": {}}),
                "`parts` must be a list",
            ),
            (
                json!({"kind": "boat", "parts": [1]}),
                "`parts[0]` must be an object",
            ),
            (
                json!({"kind": "boat", "price": "1"}),
                "`price` must be a number",
            ),
        ] {
            assert_eq!(check(value.clone()), Err(text.to_owned()), "{value}");
        }
    }
}
