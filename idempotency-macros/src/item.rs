//! The function that carries the attribute: what it may look like, and where each of its attributes goes.

use proc_macro2::{Group, Span, TokenStream, TokenTree};
use quote::{ToTokens, quote};
use syn::{
    Attribute, Error, FnArg, GenericArgument, GenericParam, Ident, Lifetime, Meta, PatType, Path,
    PathArguments, Result, Safety, Signature, Token, Type, TypeParamBound, Visibility,
    parse::{ParseStream, Parser},
    punctuated::Punctuated,
    token,
};

use crate::Attribute as Ours;

/// As many as axum's `Handler` takes.
const MAX_PARAMETERS: usize = 16;

/// A function that can become a handler with a policy.
pub(crate) struct HandlerFn {
    pub(crate) attributes: Attributes,
    pub(crate) visibility: Visibility,
    pub(crate) signature: Signature,
    /// Not parsed: whatever the compiler takes in a body, we pass on.
    pub(crate) body: Group,
    pub(crate) parameters: Vec<Type>,
}

impl HandlerFn {
    pub(crate) fn parse(ours: Ours, item: TokenStream) -> Result<Self> {
        let (attributes, (visibility, signature, body)) = (|input: ParseStream<'_>| {
            let attributes = input.call(Attribute::parse_outer)?;
            let rest = input.parse::<TokenStream>()?;
            let function = function.parse2(rest).map_err(|_| not_a_function(ours))?;
            Ok((attributes, function))
        })
        .parse2(item)?;

        let attributes = Attributes::sort(ours, attributes)?;
        let parameters = check(ours, &signature)?;
        Ok(Self {
            attributes,
            visibility,
            signature,
            body,
            parameters,
        })
    }
}

fn function(input: ParseStream<'_>) -> Result<(Visibility, Signature, Group)> {
    let visibility = input.parse()?;
    let signature = input.parse()?;
    if !input.peek(token::Brace) {
        return Err(input.error("expected a body"));
    }
    Ok((visibility, signature, input.parse()?))
}

fn not_a_function(ours: Ours) -> Error {
    Error::new(
        Span::call_site(),
        format!(
            "`#[{ours}]` goes on an `async fn` with a body, outside of traits: move it to the handler, or, for a closure or a \
             service, use the combinator `{}`",
            ours.combinator()
        ),
    )
}

/// The types of the parameters, if `signature` is one that can be a handler.
fn check(ours: Ours, signature: &Signature) -> Result<Vec<Type>> {
    let combinator = ours.combinator();
    if let Some(receiver) = signature.receiver() {
        return Err(Error::new_spanned(
            receiver.self_token,
            format!(
                "`#[{ours}]` can't go on a method: make the handler a free function, or remove the attribute and use the \
                 combinator where the route is made, as in `post(Orders::create{combinator})`"
            ),
        ));
    }
    if let Some(span) = find_self(signature.to_token_stream()) {
        return Err(Error::new(
            span,
            format!(
                "`#[{ours}]` can't go on an associated function: make the handler a free function, or remove the attribute and \
                 use the combinator where the route is made, as in `post(Orders::{}{combinator})`",
                signature.ident
            ),
        ));
    }
    check_qualifiers(ours, signature)?;
    if let Some(generic) = signature.generics.params.iter().next() {
        let name = match generic {
            GenericParam::Lifetime(lifetime) => lifetime.lifetime.to_token_stream(),
            GenericParam::Type(ty) => ty.ident.to_token_stream(),
            GenericParam::Const(constant) => constant.ident.to_token_stream(),
        };
        return Err(Error::new_spanned(
            name,
            format!(
                "`#[{ours}]` can't go on a generic function: remove the attribute and use the combinator where the route is \
                 made, as in `post({}::<…>{combinator})`",
                signature.ident
            ),
        ));
    }

    let mut parameters = Vec::new();
    for (index, input) in signature.inputs.iter().enumerate() {
        // The receiver is gone already.
        let FnArg::Typed(parameter) = input else {
            continue;
        };
        if index == MAX_PARAMETERS {
            return Err(Error::new_spanned(
                &parameter.ty,
                format!(
                    "axum's handlers take at most {MAX_PARAMETERS} parameters: put several extractors into a tuple, as in \
                     `(a, b): (A, B)`"
                ),
            ));
        }
        check_parameter(ours, signature, parameter)?;
        parameters.push(Type::clone(&parameter.ty));
    }
    Ok(parameters)
}

/// Where `Self` stands, which only an `impl` or a trait has. A function without it may be in one all the same, and nothing shows that.
fn find_self(tokens: TokenStream) -> Option<Span> {
    tokens.into_iter().find_map(|token| match token {
        TokenTree::Ident(ident) if ident == "Self" => Some(ident.span()),
        TokenTree::Group(group) => find_self(group.stream()),
        _ => None,
    })
}

fn check_qualifiers(ours: Ours, signature: &Signature) -> Result<()> {
    let unfit = match signature {
        Signature {
            constness: Some(constness),
            ..
        } => Some(("const", constness.span)),
        Signature {
            safety: Safety::Unsafe(unsafety),
            ..
        } => Some(("unsafe", unsafety.span)),
        Signature { abi: Some(abi), .. } => Some(("extern", abi.extern_token.span)),
        _ => None,
    };
    if let Some((qualifier, span)) = unfit {
        return Err(Error::new(
            span,
            format!(
                "axum's handlers can't be `{qualifier}`: remove the qualifier, or call this function from a handler"
            ),
        ));
    }
    if signature.asyncness.is_none() {
        return Err(Error::new(
            signature.fn_token.span,
            format!(
                "`#[{ours}]` goes on an `async fn`: add `async`; for a function that returns a future, use the combinator, as \
                 in `post({}{})`",
                signature.ident,
                ours.combinator()
            ),
        ));
    }
    Ok(())
}

fn check_parameter(ours: Ours, signature: &Signature, parameter: &PatType) -> Result<()> {
    if let Some(cfg) = parameter
        .attrs
        .iter()
        .find(|attr| attr.path().is_ident("cfg"))
    {
        return Err(Error::new_spanned(
            cfg,
            format!(
                "`#[{ours}]` must know all parameters: put the `#[cfg(…)]` on two versions of the function instead"
            ),
        ));
    }
    match find_in_type(&parameter.ty) {
        None => Ok(()),
        Some(Unfit::Impl(span)) => Err(Error::new(
            span,
            format!(
                "`impl Trait` in a parameter makes a function generic, which `#[{ours}]` can't take: name the type, or remove \
                 the attribute, make it a type parameter and say where the route is made what it is, as in `post({}::<…>{})`",
                signature.ident,
                ours.combinator()
            ),
        )),
        Some(Unfit::Elided(span)) => Err(Error::new(
            span,
            "handlers own what they take, so no lifetime may be left out here: use an owned type, or write `'static`",
        )),
    }
}

/// What a parameter type must not have in it.
enum Unfit {
    Impl(Span),
    Elided(Span),
}

/// The first unfit thing in `ty`. A lifetime that may be left out without a sign (`Foo` for `Foo<'_>`) can't be seen, and in
/// `fn(&T)` and `Fn(&T)` a lifetime has an owner.
fn find_in_type(ty: &Type) -> Option<Unfit> {
    match ty {
        Type::Array(array) => find_in_type(&array.elem),
        Type::Group(group) => find_in_type(&group.elem),
        Type::ImplTrait(it) => Some(Unfit::Impl(it.impl_token.span)),
        Type::Paren(paren) => find_in_type(&paren.elem),
        Type::Path(path) => path
            .qself
            .as_ref()
            .and_then(|qself| find_in_type(&qself.ty))
            .or_else(|| find_in_path(&path.path)),
        Type::Ptr(pointer) => find_in_type(&pointer.elem),
        Type::Reference(reference) => match &reference.lifetime {
            None => Some(Unfit::Elided(reference.and_token.span)),
            Some(lifetime) => find_in_lifetime(lifetime).or_else(|| find_in_type(&reference.elem)),
        },
        Type::Slice(slice) => find_in_type(&slice.elem),
        Type::TraitObject(object) => object.bounds.iter().find_map(find_in_bound),
        Type::Tuple(tuple) => tuple.elems.iter().find_map(find_in_type),
        // Function pointers own their lifetimes; macros can't be seen through; the rest is the compiler's.
        _ => None,
    }
}

fn find_in_path(path: &Path) -> Option<Unfit> {
    path.segments
        .iter()
        .filter_map(|segment| match &segment.arguments {
            PathArguments::AngleBracketed(arguments) => Some(&arguments.args),
            _ => None,
        })
        .flatten()
        .find_map(|argument| match argument {
            GenericArgument::Lifetime(lifetime) => find_in_lifetime(lifetime),
            GenericArgument::Type(ty) => find_in_type(ty),
            GenericArgument::AssocType(assoc) => find_in_type(&assoc.ty),
            GenericArgument::Constraint(constraint) => {
                constraint.bounds.iter().find_map(find_in_bound)
            }
            _ => None,
        })
}

fn find_in_bound(bound: &TypeParamBound) -> Option<Unfit> {
    match bound {
        TypeParamBound::Trait(bound) => find_in_path(&bound.path),
        TypeParamBound::Lifetime(lifetime) => find_in_lifetime(lifetime),
        _ => None,
    }
}

fn find_in_lifetime(lifetime: &Lifetime) -> Option<Unfit> {
    (lifetime.ident == "_").then(|| Unfit::Elided(lifetime.span()))
}

/// The attributes of the function, by where they go.
#[derive(Default)]
pub(crate) struct Attributes {
    /// `cfg`: on every item of the expansion.
    pub(crate) everywhere: TokenStream,
    /// Docs, deprecation and lint levels: on the constant, which is what users see.
    pub(crate) constant: TokenStream,
    /// Lint levels: on the block around the function, for the types that the expansion repeats.
    pub(crate) block: TokenStream,
    /// All others: on the function.
    pub(crate) function: TokenStream,
    /// Errors that only a `cfg_attr` whose condition holds brings about.
    pub(crate) conflicts: Vec<TokenStream>,
}

impl Attributes {
    fn sort(ours: Ours, attributes: Vec<Attribute>) -> Result<Self> {
        let mut sorted = Self::default();
        for attribute in attributes {
            sorted.add(ours, None, attribute.meta)?;
        }
        Ok(sorted)
    }

    /// `condition`: that of the `cfg_attr` around `meta`.
    fn add(&mut self, ours: Ours, condition: Option<&TokenStream>, meta: Meta) -> Result<()> {
        if let Some(conflict) = conflict(ours, &meta) {
            let Some(condition) = condition else {
                return Err(conflict);
            };
            let error = conflict.into_compile_error();
            self.conflicts.push(quote!(#[cfg(#condition)] #error));
            return Ok(());
        }

        match meta.path().get_ident().map(Ident::to_string).as_deref() {
            Some("cfg_attr") => {
                let Ok((inner, metas)) = parse_cfg_attr(&meta) else {
                    self.function.extend(wrap(condition, &meta));
                    return Ok(());
                };
                let condition = match condition {
                    Some(outer) => quote!(all(#outer, #inner)),
                    None => inner,
                };
                for meta in metas {
                    self.add(ours, Some(&condition), meta)?;
                }
            }
            Some("cfg") => self.everywhere.extend(wrap(condition, &meta)),
            Some("doc") => self.constant.extend(wrap(condition, &meta)),
            Some("deprecated") => {
                self.constant.extend(wrap(condition, &meta));
                // What is deprecated may use what is deprecated.
                let allow = quote!(allow(deprecated));
                self.block.extend(wrap(condition, &allow));
            }
            Some("allow" | "warn" | "deny" | "forbid") => {
                self.constant.extend(wrap(condition, &meta));
                self.block.extend(wrap(condition, &meta));
            }
            Some("expect") => self.add_expectation(condition, &meta),
            _ => self.function.extend(wrap(condition, &meta)),
        }
        Ok(())
    }

    /// An expectation must stand at one place, the one where its lint fires: those about an item as such fire at the constant.
    /// Those about private types in the signature don't fire, because nothing that is public has that signature.
    fn add_expectation(&mut self, condition: Option<&TokenStream>, meta: &Meta) {
        let lints = meta
            .require_list()
            .and_then(|list| list.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated));
        let Ok(lints) = lints else {
            // The compiler says what is wrong with it.
            self.function.extend(wrap(condition, meta));
            return;
        };
        let (mut constant, mut block) = (Vec::new(), Vec::new());
        let (mut for_constant, mut for_block) = (false, false);
        for lint in lints {
            match lint.path().get_ident().map(Ident::to_string).as_deref() {
                Some("reason") => {
                    constant.push(lint.clone());
                    block.push(lint);
                }
                Some("dead_code" | "missing_docs" | "unreachable_pub") => {
                    for_constant = true;
                    constant.push(lint);
                }
                Some("private_interfaces" | "private_bounds") => {}
                _ => {
                    for_block = true;
                    block.push(lint);
                }
            }
        }
        if for_constant {
            self.constant
                .extend(wrap(condition, &quote!(expect(#(#constant),*))));
        }
        if for_block {
            self.block
                .extend(wrap(condition, &quote!(expect(#(#block),*))));
        }
    }
}

fn wrap(condition: Option<&TokenStream>, meta: &impl ToTokens) -> TokenStream {
    match condition {
        Some(condition) => quote!(#[cfg_attr(#condition, #meta)]),
        None => quote!(#[#meta]),
    }
}

/// `cfg_attr(condition, attributes…)`.
fn parse_cfg_attr(meta: &Meta) -> Result<(TokenStream, Punctuated<Meta, Token![,]>)> {
    meta.require_list()?
        .parse_args_with(|input: ParseStream<'_>| {
            let mut condition = TokenStream::new();
            while !input.peek(Token![,]) {
                condition.extend([input.parse::<TokenTree>()?]);
            }
            input.parse::<Token![,]>()?;
            Ok((condition, Punctuated::parse_terminated(input)?))
        })
}

/// The error of an attribute that can't stand below ours.
fn conflict(ours: Ours, meta: &Meta) -> Option<Error> {
    if let Some(other) = Ours::named_by(meta.path()) {
        let message = if other == ours {
            format!("`#[{ours}]` is given twice: remove one of them")
        } else {
            "a handler either uses keys or is exempt: remove `#[idempotency_key]` or `#[idempotency_exempt]`".into()
        };
        return Some(Error::new_spanned(meta.path(), message));
    }
    is_utoipa_path(meta).then(|| {
        Error::new_spanned(
            meta.path(),
            format!(
                "`#[utoipa::path]` must see the function as it is written: put it above `#[{ours}]`"
            ),
        )
    })
}

/// `utoipa::path(…)`, also by another name for the crate. A `path` alone is the language's own attribute.
fn is_utoipa_path(meta: &Meta) -> bool {
    let segments = &meta.path().segments;
    segments.len() > 1
        && segments.last().is_some_and(|last| last.ident == "path")
        && matches!(meta, Meta::List(_))
}

/// The item as it was, without attributes of ours, so that an error of ours is the only one.
pub(crate) fn without_our_attributes(item: TokenStream) -> TokenStream {
    let strip = |input: ParseStream<'_>| {
        let attributes = input.call(Attribute::parse_outer)?;
        let rest = input.parse::<TokenStream>()?;
        let others = attributes
            .iter()
            .filter(|attribute| Ours::named_by(attribute.path()).is_none());
        Ok(quote!(#(#others)* #rest))
    };
    strip.parse2(item.clone()).unwrap_or(item)
}
