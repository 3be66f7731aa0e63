//! What stands in the parentheses of the attribute.

use std::time::Duration;

use proc_macro2::{Span, TokenStream};
use syn::{
    Error, Expr, ExprGroup, ExprLit, ExprPath, Ident, Lit, LitStr, Result, Token,
    ext::IdentExt,
    parse::{ParseStream, Parser},
    spanned::Spanned,
    token,
};

use crate::Attribute;

const KNOWN: &str = "`optional`, `cache_name = \"…\"`, `ttl = \"…\"`, `max_request_body = \"…\"`, `header = \"…\"`, `store_on = path` and \
                     `scope = path`";

/// What an attribute asks for.
#[expect(
    clippy::large_enum_variant,
    reason = "one an attribute, and the large one is the usual one"
)]
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
    /// In bytes.
    pub(crate) max_request_body: Option<u64>,
    /// In lower case, as `HeaderName::from_static` takes it.
    pub(crate) header: Option<LitStr>,
    /// Of a `fn() -> StoreOn`.
    pub(crate) store_on: Option<ExprPath>,
    /// Of a `fn() -> Scope`.
    pub(crate) scope: Option<ExprPath>,
}

impl KeyArgs {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let mut optional = None;
        let mut cache_name = None;
        let mut ttl = None;
        let mut max_request_body = None;
        let mut header = None;
        let mut store_on = None;
        let mut scope = None;

        while !input.is_empty() {
            let arg = Arg::parse(input)?;
            match arg.name.unraw().to_string().as_str() {
                "optional" => arg.set(&mut optional, Arg::flag)?,
                "cache_name" => arg.set(&mut cache_name, Arg::cache_name)?,
                "ttl" => arg.set(&mut ttl, Arg::ttl)?,
                "max_request_body" => arg.set(&mut max_request_body, Arg::max_request_body)?,
                "header" => arg.set(&mut header, Arg::header)?,
                "store_on" => arg.set(&mut store_on, |arg| arg.function("StoreOn"))?,
                "scope" => arg.set(&mut scope, |arg| arg.function("Scope"))?,
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
            max_request_body,
            header,
            store_on,
            scope,
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

    fn set<T>(self, slot: &mut Option<T>, read: impl FnOnce(Self) -> Result<T>) -> Result<()> {
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

    fn max_request_body(self) -> Result<u64> {
        let text = self.string(|wrong| match wrong {
            Some(Lit::Int(int)) if int.suffix().is_empty() => {
                format!("put the number in quotes, with a unit: `max_request_body = \"{int}B\"`")
            }
            _ => "give a string literal, as in `max_request_body = \"10MiB\"`, or a constant to `KeyPolicy::max_request_body`".into(),
        })?;
        size(&text.value()).map_err(|message| Error::new(text.span(), message))
    }

    fn header(self) -> Result<LitStr> {
        const CURE: &str = "give the name of a header, as in `header = \"X-GitHub-Delivery\"`";

        let name = self.string(|_| CURE.into())?;
        let text = name.value();
        if text.is_empty() || !text.bytes().all(is_token_byte) {
            return Err(Error::new(
                name.span(),
                format!("{text:?} is not the name of a header: {CURE}"),
            ));
        }
        Ok(LitStr::new(&text.to_ascii_lowercase(), name.span()))
    }

    /// The path of a function without parameters that returns a `result`.
    fn function(self, result: &str) -> Result<ExprPath> {
        let name = &self.name;
        let cure = || {
            format!(
                "`{name}` takes the path of a function: write `fn my_{name}() -> {result}`, and `{name} = my_{name}`"
            )
        };
        match self.value {
            Some(value) => path(value).map_err(|span| Error::new(span, cure())),
            None => Err(Error::new(name.span(), cure())),
        }
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

/// The path that `value` is, or where it stands.
fn path(value: Expr) -> std::result::Result<ExprPath, Span> {
    match value {
        Expr::Path(path) => Ok(path),
        Expr::Group(ExprGroup { expr, .. }) => path(*expr),
        other => Err(other.span()),
    }
}

/// Whether a header's name may contain `byte`: `tchar` of RFC 9110, section 5.6.2.
fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Reads `10MiB`, as the settings do: digits and one unit; without a unit, bytes.
fn size(text: &str) -> std::result::Result<u64, String> {
    const FORM: &str = "write digits and a unit (`B`, `KB`, `MB`, `GB`, `KiB`, `MiB`, `GiB`), as in `max_request_body = \"10MiB\"`";

    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(format!("{text:?} is not a size: {FORM}"));
    }
    let unit = unit.trim_start();
    let scale = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "k" | "m" | "g" => {
            return Err(format!(
                "`{unit}` means 1000 to some and 1024 to others: write `{unit}B` or `{unit}iB`"
            ));
        }
        _ => return Err(format!("`{unit}` is not a unit of size: {FORM}")),
    };
    let number: Option<u64> = number.parse().ok();
    number
        .and_then(|number| number.checked_mul(scale))
        .ok_or_else(|| format!("`{text}` is too large for a size: {FORM}"))
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
    fn sizes_are_those_of_the_settings() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("512 B", 512),
            ("2mb", 2_000_000),
            ("64 KiB", 65_536),
            ("10MiB", 10 << 20),
            (" 3GB ", 3_000_000_000),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text:?}");
        }
        for text in [
            "",
            " ",
            "B",
            "-1",
            "+1",
            "1.5MiB",
            "1K",
            "1M",
            "1 MiB2",
            "1MiBs",
            "٣B",
            "99999999999GiB",
        ] {
            assert!(size(text).is_err(), "{text:?}");
        }
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
