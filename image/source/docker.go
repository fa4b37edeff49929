package source

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/thaw-project/thaw/image/registry"
	"github.com/thaw-project/thaw/image/spool"
	"github.com/thaw-project/thaw/kind"
)

// maxConfigBytes bounds an image configuration, as containerd does.
const maxConfigBytes = 8 << 20

// fromDocker is an image in an archive of docker save. Such archives have no
// manifest in the registry's sense: one is made, which depends only on the
// archive's content.
type fromDocker struct {
	reference string
	archive   *archive
	root      ocispec.Descriptor
	raw       []byte
	names     map[digest.Digest]string // of blobs in the archive
}

func openDockerArchive(ctx context.Context, reference, path, ref, spoolDir string) (_ Source, err error) {
	a, err := openArchive(ctx, path, spoolDir)
	if err != nil {
		return nil, err
	}
	s := &fromDocker{reference: reference, archive: a, names: map[digest.Digest]string{}}
	defer func() {
		if err != nil {
			a.Close()
			err = fmt.Errorf("open %s: %w", reference, err)
		}
	}()
	raw, err := readFile(a, "manifest.json")
	if err != nil {
		return nil, fmt.Errorf("not an archive of docker save: %w", err)
	}
	var images []dockerImage
	if err := Decode("manifest.json", raw, &images); err != nil {
		return nil, err
	}
	image, err := chooseDocker(images, ref)
	if err != nil {
		return nil, err
	}
	return s, s.build(ctx, image)
}

type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func chooseDocker(images []dockerImage, ref string) (dockerImage, error) {
	var tags []string
	var found []dockerImage
	for _, i := range images {
		match := ref == ""
		for _, t := range i.RepoTags {
			if len(tags) < 20 {
				tags = append(tags, fmt.Sprintf("%.100q", t))
			}
			match = match || sameReference(t, ref)
		}
		if match {
			found = append(found, i)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) == 0:
		return dockerImage{}, kind.Errorf(kind.NotFound, "the archive has %s", lacks(ref, tags))
	case ref == "":
		return dockerImage{}, kind.Errorf(kind.Invalid, "the archive holds %d images: append :REF, one of %s", len(found), strings.Join(tags, ", "))
	default:
		return dockerImage{}, kind.Errorf(kind.Invalid, "the archive has %d images named %.100q", len(found), ref)
	}
}

// lacks says that there is no image called ref among those with tags, or none at all.
func lacks(ref string, tags []string) string {
	switch {
	case ref == "":
		return "no image at all"
	case len(tags) == 0:
		return fmt.Sprintf("no image %.100q, and none with a name", ref)
	}
	return fmt.Sprintf("no image %.100q, but %s", ref, strings.Join(tags, ", "))
}

func sameReference(a, b string) bool {
	if a == b {
		return true
	}
	x, xerr := name.ParseReference(a)
	y, yerr := name.ParseReference(b)
	return xerr == nil && yerr == nil && x.Name() == y.Name()
}

func (s *fromDocker) build(ctx context.Context, image dockerImage) error {
	config, err := s.readConfig(image.Config)
	if err != nil {
		return err
	}
	var parsed ocispec.Image
	if err := Decode(fmt.Sprintf("image configuration %.200q", image.Config), config, &parsed); err != nil {
		return err
	}
	if len(parsed.RootFS.DiffIDs) != len(image.Layers) {
		return kind.Errorf(kind.Corrupt, "the archive has %d layers, the image configuration names %d", len(image.Layers), len(parsed.RootFS.DiffIDs))
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageConfig,
			Digest:    digest.FromBytes(config),
			Size:      int64(len(config)),
		},
	}
	s.names[m.Config.Digest] = image.Config
	for i, l := range image.Layers {
		d, err := s.layer(ctx, l, parsed.RootFS.DiffIDs[i])
		if err != nil {
			return fmt.Errorf("layer %d of %d: %w", i+1, len(image.Layers), err)
		}
		s.names[d.Digest] = l
		m.Layers = append(m.Layers, d)
	}
	if s.raw, err = json.Marshal(m); err != nil {
		return err
	}
	s.root = ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(s.raw), Size: int64(len(s.raw))}
	return nil
}

func (s *fromDocker) readConfig(name string) ([]byte, error) {
	f, size, err := s.archive.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readBounded(io.NewSectionReader(f, 0, size), maxConfigBytes)
}

// layer describes the layer in the file name. A plain tar's digest is its diffID,
// which whoever reads it verifies; that of a compressed one must be computed.
func (s *fromDocker) layer(ctx context.Context, name string, diffID digest.Digest) (ocispec.Descriptor, error) {
	f, size, err := s.archive.open(name)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer f.Close()
	var magic [4]byte
	if n, err := f.ReadAt(magic[:], 0); err != nil && err != io.EOF {
		return ocispec.Descriptor{}, fmt.Errorf("read %.200q: %w", name, err)
	} else if n < len(magic) {
		magic = [4]byte{}
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: diffID, Size: size}
	switch {
	case bytes.HasPrefix(magic[:], []byte{0x1f, 0x8b}):
		d.MediaType = ocispec.MediaTypeImageLayerGzip
	case magic == [4]byte{0x28, 0xb5, 0x2f, 0xfd}:
		d.MediaType = ocispec.MediaTypeImageLayerZstd
	default:
		return d, SupportedDigest(diffID)
	}
	d.Digest, err = digest.FromReader(&cancelable{ctx, io.NewSectionReader(f, 0, size)})
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("read %.200q: %w", name, err)
	}
	return d, nil
}

func (s *fromDocker) String() string           { return s.reference }
func (s *fromDocker) Root() ocispec.Descriptor { return s.root }
func (s *fromDocker) Close() error             { return s.archive.Close() }

func (s *fromDocker) Manifest(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	if d.Digest != s.root.Digest {
		return nil, kind.Errorf(kind.NotFound, "%s lacks manifest %s", s.reference, d.Digest)
	}
	return readManifest(io.LimitReader(bytes.NewReader(s.raw), registry.MaxManifestBytes+1), d)
}

func (s *fromDocker) File(d ocispec.Descriptor) (spool.File, error) {
	n, ok := s.names[d.Digest]
	if !ok {
		return nil, kind.Errorf(kind.NotFound, "%s lacks blob %s", s.reference, d.Digest)
	}
	f, _, err := s.archive.open(n)
	return f, err
}

func (s *fromDocker) Blob(_ context.Context, d ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	f, err := s.File(d)
	if err != nil {
		return nil, err
	}
	return section{io.NewSectionReader(f, offset, 1<<62), f}, nil
}
