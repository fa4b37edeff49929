package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"sort"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/thaw-project/thaw/image/annotation"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/image/registry"
	"github.com/thaw-project/thaw/image/source"
	"github.com/thaw-project/thaw/kind"
)

const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerLayer    = "application/vnd.docker.image.rootfs.diff.tar"

	// maxConfigBytes bounds an image configuration, as containerd does.
	maxConfigBytes = 8 << 20
	// maxIndexEntries bounds the platforms and attestations of an index.
	maxIndexEntries = 1024

	// BuildKit marks a manifest that speaks of another one by these annotations of
	// its descriptor.
	attestationType   = "vnd.docker.reference.type"
	attestationDigest = "vnd.docker.reference.digest"
)

// object is a JSON object whose values, known or not, keep their bytes. Encoded,
// its keys are sorted, so that the same object always gives the same bytes.
type object map[string]json.RawMessage

func (o object) set(key string, value any) error {
	raw, err := encode(value)
	if err != nil {
		return err
	}
	o[key] = raw
	return nil
}

func encode(v any) (json.RawMessage, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // so that unknown values keep their bytes
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// plan is what is to be converted.
type plan struct {
	index   object // nil for a single manifest
	entries []entry
	root    ocispec.Descriptor
}

// entry is one manifest of an index, or the only one.
type entry struct {
	raw        object // its descriptor
	descriptor ocispec.Descriptor
	image      *image // to be converted; nil for what passes through
}

// images are those of p to convert, in order.
func (p *plan) images() []*image {
	var out []*image
	for i := range p.entries {
		if p.entries[i].image != nil {
			out = append(out, p.entries[i].image)
		}
	}
	return out
}

// image is one platform's image.
type image struct {
	platform   string
	descriptor ocispec.Descriptor
	manifest   object
	config     ocispec.Descriptor
	configRaw  []byte
	layers     []imageLayer
	soldier    string

	converted    ocispec.Descriptor // once converted
	convertedRaw []byte
}

// imageLayer is one layer of an image.
type imageLayer struct {
	raw        object // its descriptor in the manifest
	descriptor ocispec.Descriptor
	diffID     digest.Digest
	chainID    digest.Digest
	block      string
}

// makePlan reads the manifests of s and chooses what to convert.
func makePlan(ctx context.Context, s source.Source, wanted []string) (*plan, error) {
	root := s.Root()
	if err := source.SupportedDigest(root.Digest); err != nil {
		return nil, err
	}
	switch {
	case isIndex(root.MediaType):
		return planIndex(ctx, s, wanted)
	case isManifest(root.MediaType):
		i, err := readImage(ctx, s, root)
		if err != nil {
			return nil, err
		}
		if len(wanted) > 0 {
			p, err := platforms.Parse(i.platform)
			ok := err == nil && wantsAny(wanted, p)
			if !ok {
				return nil, kind.Errorf(kind.NotFound, "%s is an image for %s only, not for %s", s, i.platform, strings.Join(wanted, ", "))
			}
		}
		return &plan{root: root, entries: []entry{{descriptor: root, image: i}}}, nil
	case strings.HasPrefix(root.MediaType, "application/vnd.docker.distribution.manifest.v1"):
		return nil, kind.Errorf(kind.Unsupported, "%s is a schema 1 manifest, which says too little about its layers: push the image again with a current tool", s)
	}
	return nil, kind.Errorf(kind.Unsupported, "%s is of type %.100q, which is no container image", s, root.MediaType)
}

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == dockerList
}

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == dockerManifest
}

func wantsAny(wanted []string, p ocispec.Platform) bool {
	for _, w := range wanted {
		if w == AllPlatforms {
			return true
		}
		if want, err := platforms.Parse(w); err == nil && platforms.Only(want).Match(p) {
			return true
		}
	}
	return false
}

// planIndex chooses from an index: the images of the wanted platforms are
// converted, attestations of those pass through, and the rest is left out: nodes
// of another platform have the source to pull.
func planIndex(ctx context.Context, s source.Source, wanted []string) (*plan, error) {
	root := s.Root()
	raw, err := s.Manifest(ctx, root)
	if err != nil {
		return nil, err
	}
	p := &plan{root: root}
	what := fmt.Sprintf("index %s of %s", root.Digest, s)
	if err := source.Decode(what, raw, &p.index); err != nil {
		return nil, err
	}
	var list []object
	if err := source.Decode(what+": manifests", p.index["manifests"], &list); err != nil {
		return nil, err
	}
	if len(list) > maxIndexEntries {
		return nil, kind.Errorf(kind.Invalid, "%s has %d manifests, at most %d are supported", what, len(list), maxIndexEntries)
	}
	var all []entry
	for n, o := range list {
		e := entry{raw: o}
		if e.descriptor, err = descriptorOf(o); err != nil {
			return nil, fmt.Errorf("%s: manifest %d of %d: %w", what, n+1, len(list), err)
		}
		if isIndex(e.descriptor.MediaType) {
			return nil, kind.Errorf(kind.Unsupported, "%s holds another index, %s: convert that one", what, e.descriptor.Digest)
		}
		all = append(all, e)
	}
	chosen, err := choosePlatforms(ctx, s, all, wanted)
	if err != nil {
		return nil, err
	}
	for n := range all {
		e := all[n]
		switch {
		case chosen[n]:
			if e.image, err = readImage(ctx, s, e.descriptor); err != nil {
				return nil, err
			}
			if e.descriptor.Platform != nil {
				e.image.platform = platforms.Format(platforms.Normalize(*e.descriptor.Platform))
			}
			p.entries = append(p.entries, e)
		case isAttestation(e.descriptor) && attestsChosen(e.descriptor, all, chosen):
			p.entries = append(p.entries, e)
		}
	}
	return p, nil
}

func isAttestation(d ocispec.Descriptor) bool {
	return d.Annotations[attestationType] != "" ||
		d.Platform != nil && d.Platform.OS == "unknown" && d.Platform.Architecture == "unknown"
}

// attestsChosen tells whether d speaks of an image that is converted, or does not
// say of which it speaks.
func attestsChosen(d ocispec.Descriptor, all []entry, chosen map[int]bool) bool {
	of := d.Annotations[attestationDigest]
	if of == "" {
		return true
	}
	for n := range chosen {
		if all[n].descriptor.Digest.String() == of {
			return true
		}
	}
	return false
}

// choosePlatforms returns the positions in all of the images to convert: for each
// wanted platform the one that containerd would run.
func choosePlatforms(ctx context.Context, s source.Source, all []entry, wanted []string) (map[int]bool, error) {
	var candidates []int
	var have []string
	platform := map[int]ocispec.Platform{}
	for n, e := range all {
		if isAttestation(e.descriptor) || !isManifest(e.descriptor.MediaType) || e.descriptor.ArtifactType != "" {
			continue
		}
		p := e.descriptor.Platform
		if p == nil { // only the configuration tells
			i, err := readImage(ctx, s, e.descriptor)
			if err != nil {
				return nil, err
			}
			parsed, err := platforms.Parse(i.platform)
			if err != nil {
				return nil, kind.Errorf(kind.Invalid, "manifest %s: platform %.60q: %w", e.descriptor.Digest, i.platform, err)
			}
			p = &parsed
		}
		platform[n] = platforms.Normalize(*p)
		candidates = append(candidates, n)
		have = append(have, platforms.Format(platform[n]))
	}
	if len(wanted) == 0 {
		wanted = []string{platforms.Format(platforms.DefaultSpec())}
	}
	chosen := map[int]bool{}
	for _, w := range wanted {
		if w == AllPlatforms {
			for _, n := range candidates {
				chosen[n] = true
			}
			if len(candidates) > 0 {
				continue
			}
		} else {
			want, err := platforms.Parse(w)
			if err != nil {
				return nil, kind.Errorf(kind.Invalid, "platform %.60q is not os/arch[/variant]: %w", w, err)
			}
			match := platforms.Only(want)
			var fit []int
			for _, n := range candidates {
				if match.Match(platform[n]) {
					fit = append(fit, n)
				}
			}
			sort.SliceStable(fit, func(a, b int) bool { return match.Less(platform[fit[a]], platform[fit[b]]) })
			if len(fit) > 0 {
				chosen[fit[0]] = true
				continue
			}
		}
		return nil, kind.Errorf(kind.NotFound, "%s has no image for %s; it has %s", s, w, strings.Join(have, ", "))
	}
	return chosen, nil
}

func descriptorOf(o object) (ocispec.Descriptor, error) {
	raw, err := encode(o)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var d ocispec.Descriptor
	if err := source.Decode("descriptor", raw, &d); err != nil {
		return d, err
	}
	if err := source.SupportedDigest(d.Digest); err != nil {
		return d, err
	}
	if d.Size < 0 {
		return d, kind.Errorf(kind.Invalid, "descriptor of %s: size %d is negative", d.Digest, d.Size)
	}
	return d, nil
}

// readImage reads the manifest d and its configuration, and checks that they are
// those of an image this program can convert.
func readImage(ctx context.Context, s source.Source, d ocispec.Descriptor) (*image, error) {
	raw, err := s.Manifest(ctx, d)
	if err != nil {
		return nil, err
	}
	i := &image{descriptor: d}
	what := fmt.Sprintf("manifest %s of %s", d.Digest, s)
	fail := func(k kind.Kind, format string, args ...any) (*image, error) {
		return nil, kind.Errorf(k, "%s: %w", what, fmt.Errorf(format, args...))
	}
	if err := source.Decode(what, raw, &i.manifest); err != nil {
		return nil, err
	}
	var config object
	if err := source.Decode(what+": config", i.manifest["config"], &config); err != nil {
		return nil, err
	}
	if i.config, err = descriptorOf(config); err != nil {
		return nil, fmt.Errorf("%s: config: %w", what, err)
	}
	if t := i.config.MediaType; t != ocispec.MediaTypeImageConfig && t != dockerConfig {
		return fail(kind.Unsupported, "its configuration is of type %.100q: it is no container image", t)
	}
	if i.configRaw, err = readConfig(ctx, s, i.config); err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	var parsed ocispec.Image
	if err := source.Decode(fmt.Sprintf("%s: image configuration %s", what, i.config.Digest), i.configRaw, &parsed); err != nil {
		return nil, err
	}
	i.platform = platforms.Format(platforms.Normalize(parsed.Platform))

	var layers []object
	if err := source.Decode(what+": layers", i.manifest["layers"], &layers); err != nil {
		return nil, err
	}
	switch {
	case len(layers) == 0:
		return fail(kind.Unsupported, "the image has no layers: there is nothing to convert")
	case len(layers) > annotation.MaxLayers:
		return fail(kind.Unsupported, "the image has %d layers, at most %d are supported", len(layers), annotation.MaxLayers)
	case len(layers) != len(parsed.RootFS.DiffIDs):
		return fail(kind.Corrupt, "it has %d layers, its configuration names %d", len(layers), len(parsed.RootFS.DiffIDs))
	}
	chain := identity.ChainIDs(append([]digest.Digest(nil), parsed.RootFS.DiffIDs...))
	for n, o := range layers {
		l := imageLayer{raw: o, diffID: parsed.RootFS.DiffIDs[n], chainID: chain[n]}
		if err := source.SupportedDigest(l.diffID); err != nil {
			return nil, fmt.Errorf("%s: layer %d of %d: diff id: %w", what, n+1, len(layers), err)
		}
		if l.descriptor, err = descriptorOf(o); err != nil {
			return nil, fmt.Errorf("%s: layer %d of %d: %w", what, n+1, len(layers), err)
		}
		if err := supportedLayer(l.descriptor); err != nil {
			return nil, fmt.Errorf("%s: layer %d of %d: %w", what, n+1, len(layers), err)
		}
		i.layers = append(i.layers, l)
	}
	return i, nil
}

func readConfig(ctx context.Context, s source.Source, d ocispec.Descriptor) ([]byte, error) {
	if d.Size > maxConfigBytes {
		return nil, kind.Errorf(kind.Invalid, "image configuration %s has %d bytes, at most %d are supported", d.Digest, d.Size, maxConfigBytes)
	}
	r, err := s.Blob(ctx, d, 0)
	if err != nil {
		return nil, fmt.Errorf("image configuration: %w", err)
	}
	defer r.Close()
	raw, err := io.ReadAll(io.LimitReader(r, d.Size+1))
	if err != nil {
		return nil, fmt.Errorf("image configuration %s: %w", d.Digest, err)
	}
	if got := digest.FromBytes(raw); got != d.Digest {
		return nil, kind.Errorf(kind.Corrupt, "image configuration %s: %d bytes of %d, with digest %s", d.Digest, len(raw), d.Size, got)
	}
	return raw, nil
}

func supportedLayer(d ocispec.Descriptor) error {
	switch d.MediaType {
	case ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd,
		dockerLayer, dockerLayer + ".gzip", dockerLayer + ".zstd":
		if len(d.URLs) == 0 {
			return nil
		}
		return kind.Errorf(kind.Unsupported, "%s is a foreign layer, to be fetched from elsewhere: such images cannot be converted", d.Digest)
	}
	if strings.Contains(d.MediaType, "foreign") || strings.Contains(d.MediaType, "nondistributable") {
		return kind.Errorf(kind.Unsupported, "%s is a foreign layer (%s): such images cannot be converted", d.Digest, d.MediaType)
	}
	if strings.HasSuffix(d.MediaType, "+encrypted") {
		return kind.Errorf(kind.Unsupported, "%s is an encrypted layer: decrypt the image first", d.Digest)
	}
	return kind.Errorf(kind.Unsupported, "%s is of type %.100q, which is no layer of a container image", d.Digest, d.MediaType)
}

// blobsOf returns what a manifest that passes through refers to: its config, layers
// and, for artifacts of older drafts, blobs.
func blobsOf(raw []byte) ([]ocispec.Descriptor, error) {
	var m struct {
		Config json.RawMessage   `json:"config"`
		Layers []json.RawMessage `json:"layers"`
		Blobs  []json.RawMessage `json:"blobs"`
	}
	if err := source.Decode("manifest", raw, &m); err != nil {
		return nil, err
	}
	list := append(m.Layers, m.Blobs...)
	if m.Config != nil {
		list = append(list, m.Config)
	}
	if len(list) > annotation.MaxLayers {
		return nil, kind.Errorf(kind.Unsupported, "it has %d blobs, at most %d are supported", len(list), annotation.MaxLayers)
	}
	var out []ocispec.Descriptor
	for _, r := range list {
		var o object
		if err := source.Decode("descriptor", r, &o); err != nil {
			return nil, err
		}
		d, err := descriptorOf(o)
		if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

// nameBlocks gives each layer its block.
func (i *image) nameBlocks(o *Options, repository string) {
	spec := block.Spec{Mode: o.Mode, Filesystem: o.Filesystem, VirtualSize: o.VirtualSizeBytes}
	for n := range i.layers {
		l := &i.layers[n]
		spec.ChainID = l.chainID
		if l.block = spec.LocalName(repository); n < o.GlobalLayers {
			l.block = spec.GlobalName()
		}
	}
	i.soldier = spec.SoldierName(repository, i.config.Digest)
}

// annotate makes the converted manifest: the source's, with where each layer is.
func (i *image) annotate(o *Options, target string) error {
	var layers []object
	for n, l := range i.layers {
		annotations := map[string]string{}
		for k, v := range l.descriptor.Annotations {
			if !strings.HasPrefix(k, annotation.Prefix) { // the source may be a converted image
				annotations[k] = v
			}
		}
		ref := annotation.LayerRef{
			Block:      l.block,
			Leaf:       i.soldier,
			Mode:       o.Mode,
			Filesystem: o.Filesystem,
			Index:      n,
			Count:      len(i.layers),
			Target:     target,
		}
		for k, v := range ref.Annotations() {
			annotations[k] = v
		}
		layer := object{}
		for k, v := range l.raw {
			layer[k] = v
		}
		if err := layer.set("annotations", annotations); err != nil {
			return err
		}
		layers = append(layers, layer)
	}
	manifest := object{}
	for k, v := range i.manifest {
		manifest[k] = v
	}
	if err := manifest.set("layers", layers); err != nil {
		return err
	}
	raw, err := encode(manifest)
	if err != nil {
		return err
	}
	if len(raw) > registry.MaxManifestBytes {
		return kind.Errorf(kind.Unsupported, "the converted manifest has %d bytes, registries take at most %d", len(raw), registry.MaxManifestBytes)
	}
	i.convertedRaw = raw
	i.converted = describe(i.descriptor.MediaType, raw)
	return nil
}

// document returns the index of the converted images: the source's, with what was
// converted in the place of what it was converted from.
func (p *plan) document() ([]byte, error) {
	renamed := map[string]string{}
	for _, i := range p.images() {
		renamed[i.descriptor.Digest.String()] = i.converted.Digest.String()
	}
	var list []object
	for _, e := range p.entries {
		d := object{}
		for k, v := range e.raw {
			d[k] = v
		}
		if e.image != nil {
			if err := d.set("digest", e.image.converted.Digest); err != nil {
				return nil, err
			}
			if err := d.set("size", e.image.converted.Size); err != nil {
				return nil, err
			}
			delete(d, "data") // a copy of the old manifest
		} else if to := renamed[e.descriptor.Annotations[attestationDigest]]; to != "" {
			annotations := map[string]string{}
			for k, v := range e.descriptor.Annotations {
				annotations[k] = v
			}
			annotations[attestationDigest] = to
			if err := d.set("annotations", annotations); err != nil {
				return nil, err
			}
		}
		list = append(list, d)
	}
	index := object{}
	for k, v := range p.index {
		index[k] = v
	}
	if err := index.set("manifests", list); err != nil {
		return nil, err
	}
	return encode(index)
}
