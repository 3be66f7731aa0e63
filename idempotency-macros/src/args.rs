//! What stands in the parentheses of the attribute.

use std::time::Duration;

use proc_macro2::{Span, TokenStream};
use syn::{
    Error, Expr, ExprGroup, ExprLit, Ident, Lit, LitStr, Result, Token,
    ext::IdentExt,
    parse::{ParseStream, Parser},
    spanned::Spanned,
    token,
};

use crate::Attribute;

const KNOWN: &str = "`optional`, `cache_name = \"…\"` and `ttl = \"…\"`";

/// What an attribute asks for.
pub(crate) enum Policy {
    Key(KeyArgs),
    Exempt,
}

impl Policy {
    pub(crate) fn parse(attribute: Attribute, args: TokenStream) -> Result<Self> {
        match attribute {
            Attribute::Key => KeyArgs::parse.parse2(args).map(Self::Key),
            Attribute::Exempt if args.is_empty() => Ok(Self::Exempt),
            Attribute::Exempt => Err(Error::new_spanned(
                args,
                "`#[idempotency_exempt]` takes no arguments: remove them; for keys that a client may leave out, use \
                 `#[idempotency_key(optional)]`",
            )),
        }
    }
}

/// The arguments of `#[idempotency_key]`.
pub(crate) struct KeyArgs {
    pub(crate) optional: bool,
    pub(crate) cache_name: Option<LitStr>,
    pub(crate) ttl: Option<Duration>,
}

impl KeyArgs {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let mut optional = None;
        let mut cache_name = None;
        let mut ttl = None;

        while !input.is_empty() {
            let arg = Arg::parse(input)?;
            match arg.name.unraw().to_string().as_str() {
                "optional" => arg.set(&mut optional, Arg::flag)?,
                "cache_name" => arg.set(&mut cache_name, Arg::cache_name)?,
                "ttl" => arg.set(&mut ttl, Arg::ttl)?,
                unknown => {
                    return Err(Error::new(
                        arg.name.span(),
                        format!("unknown argument `{unknown}`: `#[idempotency_key]` takes {KNOWN}"),
                    ));
                }
            }
            if input.is_empty() {
                break;
            }
            if !input.peek(Token![,]) {
                return Err(input.error("expected `,`: separate the arguments with commas"));
            }
            input.parse::<Token![,]>()?;
        }

        Ok(Self {
            optional: optional.unwrap_or(false),
            cache_name,
            ttl,
        })
    }
}

/// `name` or `name = value`.
struct Arg {
    name: Ident,
    value: Option<Expr>,
}

impl Arg {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        if !input.peek(Ident::peek_any) {
            return Err(input.error(format!(
                "expected the name of an argument: `#[idempotency_key]` takes {KNOWN}"
            )));
        }
        let name = input.call(Ident::parse_any)?;
        if input.peek(token::Paren) {
            return Err(input.error(format!("a value follows an `=`: write `{name} = …`")));
        }
        let value = match input.parse::<Option<Token![=]>>()? {
            Some(_) if input.is_empty() || input.peek(Token![,]) => {
                return Err(Error::new(
                    name.span(),
                    format!(
                        "expected a value after `{name} =`: `#[idempotency_key]` takes {KNOWN}"
                    ),
                ));
            }
            Some(_) => Some(input.parse()?),
            None => None,
        };
        Ok(Self { name, value })
    }

    fn set<T>(self, slot: &mut Option<T>, read: fn(Self) -> Result<T>) -> Result<()> {
        if slot.is_some() {
            return Err(Error::new(
                self.name.span(),
                format!("`{}` is given twice: remove one of them", self.name),
            ));
        }
        *slot = Some(read(self)?);
        Ok(())
    }

    fn flag(self) -> Result<bool> {
        match self.value.map(literal) {
            None => Ok(true),
            Some(Ok(Lit::Bool(flag))) => Ok(flag.value),
            Some(Ok(other)) => Err(Self::no_flag(other.span())),
            Some(Err(span)) => Err(Self::no_flag(span)),
        }
    }

    fn no_flag(span: Span) -> Error {
        Error::new(
            span,
            "`optional` takes no value, or `true` or `false` without quotes: `optional`, `optional = true`",
        )
    }

    fn cache_name(self) -> Result<LitStr> {
        const CURE: &str = "give a string literal, as in `cache_name = \"orders\"`";

        let name = self.string(|_| CURE.into())?;
        if name.value().trim().is_empty() {
            return Err(Error::new(
                name.span(),
                "the cache name is empty: name a cache of the layer, as in `cache_name = \"orders\"`, or remove the argument \
                 to use the layer's own storage",
            ));
        }
        Ok(name)
    }

    fn ttl(self) -> Result<Duration> {
        let text = self.string(|wrong| match wrong {
            Some(Lit::Int(int)) if int.suffix().is_empty() => {
                format!("put the number in quotes, with a unit: `ttl = \"{int}s\"`")
            }
            _ => "give a string literal, as in `ttl = \"24h\"`".into(),
        })?;
        duration(&text.value()).map_err(|message| Error::new(text.span(), message))
    }

    /// The string literal behind the `=`; `cure` is told what is there instead.
    fn string(self, cure: impl FnOnce(Option<&Lit>) -> String) -> Result<LitStr> {
        let (span, wrong) = match self.value.map(literal) {
            Some(Ok(Lit::Str(string))) => return Ok(string),
            Some(Ok(other)) => (other.span(), Some(other)),
            Some(Err(span)) => (span, None),
            None => (self.name.span(), None),
        };
        Err(Error::new(
            span,
            format!("`{}` takes a string: {}", self.name, cure(wrong.as_ref())),
        ))
    }
}

/// The literal that `value` is, or where it stands. A literal that a `macro_rules` macro passes on comes in a group.
fn literal(value: Expr) -> std::result::Result<Lit, Span> {
    match value {
        Expr::Lit(ExprLit { lit, .. }) => Ok(lit),
        Expr::Group(ExprGroup { expr, .. }) => literal(*expr),
        other => Err(other.span()),
    }
}

/// Reads `24h`: digits and one unit; without a unit, seconds.
fn duration(text: &str) -> std::result::Result<Duration, String> {
    const FORM: &str = "write digits and a unit (`ms`, `s`, `m`, `h`, `d`), as in `ttl = \"24h\"`";

    if text.is_empty() {
        return Err(format!("the `ttl` is empty: {FORM}"));
    }
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(format!("`{text}` is not a duration: {FORM}"));
    }
    let scale = match unit {
        "ms" => None,
        "" | "s" => Some(1),
        "m" => Some(60),
        "h" => Some(60 * 60),
        "d" => Some(24 * 60 * 60),
        _ => return Err(format!("`{unit}` is not a unit of time: {FORM}")),
    };
    // All digits: the only error is one of range.
    let number: Option<u64> = number.parse().ok();
    let ttl = match scale {
        None => number.map(Duration::from_millis),
        Some(scale) => number
            .and_then(|number| number.checked_mul(scale))
            .map(Duration::from_secs),
    };
    match ttl {
        Some(Duration::ZERO) => Err(
            "a `ttl` of zero would keep no record, so retries would run again: give a longer one, or use \
             `#[idempotency_exempt]`"
                .into(),
        ),
        Some(ttl) => Ok(ttl),
        None => Err(format!("`{text}` is too long for a duration: {FORM}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_one_unit_and_default_to_seconds() {
        let seconds = |text| duration(text).map(|ttl| ttl.as_secs_f64());
        assert_eq!(seconds("250ms"), Ok(0.25));
        assert_eq!(seconds("90"), Ok(90.0));
        assert_eq!(seconds("90s"), Ok(90.0));
        assert_eq!(seconds("15m"), Ok(900.0));
        assert_eq!(seconds("24h"), Ok(86_400.0));
        assert_eq!(seconds("7d"), Ok(604_800.0));
        assert_eq!(
            duration("18446744073709551615"),
            Ok(Duration::from_secs(u64::MAX))
        );
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for text in [
            "",
            " ",
            "h",
            "-1s",
            "+1s",
            "1.5h",
            "1h30m",
            "24 h",
            " 24h",
            "24H",
            "2w",
            "٣s",
            "1µs",
            "0",
            "0ms",
            "00d",
            "18446744073709551616",
            "18446744073709551615m",
        ] {
            assert!(duration(text).is_err(), "{text:?}");
        }
    }
}
