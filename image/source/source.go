// Package source reads images from where users have them: a registry, an OCI
// layout directory or archive, or an archive of docker save.
//
// Every source looks the same: raw manifests and blobs by descriptor. One whose
// blobs are on this machine is also a spool.Local. Manifests
// are verified here; blobs are not, because their reader hashes them anyway. The
// package knows nothing of blocks and changes no byte. All that it reads is
// hostile.
package source

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/thaw-project/thaw/image/registry"
	"github.com/thaw-project/thaw/kind"
)

// Source is one resolved image. Methods may be called concurrently.
type Source interface {
	// String names the source as the user did.
	String() string

	// Root is the image's manifest or index.
	Root() ocispec.Descriptor

	// Manifest returns the bytes of a manifest or index; their digest is d's.
	Manifest(ctx context.Context, d ocispec.Descriptor) ([]byte, error)

	// Blob opens a blob at offset. What is read is not verified.
	Blob(ctx context.Context, d ocispec.Descriptor, offset int64) (io.ReadCloser, error)

	Close() error
}

// Repository is a Source from whose repository a registry can mount blobs.
type Repository interface{ Repository() name.Repository }

// Open resolves reference: a registry reference, oci:DIR[:TAG],
// oci-archive:FILE[:TAG] or docker-archive:FILE[:REF]. Compressed archives are
// unpacked into a nameless file in spoolDir.
func Open(ctx context.Context, reference string, client *registry.Client, spoolDir string) (Source, error) {
	scheme, rest, _ := strings.Cut(reference, ":")
	switch scheme {
	case "oci":
		path, tag := splitPath(rest)
		return openLayout(reference, path, tag)
	case "oci-archive":
		path, tag := splitPath(rest)
		return openLayoutArchive(ctx, reference, path, tag, spoolDir)
	case "docker-archive":
		path, ref := splitPath(rest)
		return openDockerArchive(ctx, reference, path, ref, spoolDir)
	case "docker", "https", "http":
		if strings.HasPrefix(rest, "//") {
			if scheme != "docker" {
				return nil, kind.Errorf(kind.Invalid, "source %.200q: give the image reference without %s://", reference, scheme)
			}
			reference = strings.TrimPrefix(rest, "//")
		}
	}
	return openRegistry(ctx, reference, client)
}

// splitPath splits PATH[:TAG] at the first colon, as skopeo does, unless a file of
// the whole name exists.
func splitPath(s string) (path, tag string) {
	if _, err := os.Lstat(s); err == nil {
		return s, ""
	}
	path, tag, _ = strings.Cut(s, ":")
	return path, tag
}

// SupportedDigest checks that d is one that every part of Thaw can verify.
func SupportedDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return kind.Errorf(kind.Invalid, "digest %.100q: %w", string(d), err)
	}
	if d.Algorithm() != digest.SHA256 {
		return kind.Errorf(kind.Unsupported, "digest %.140s: only sha256 is supported", d)
	}
	return nil
}

// readManifest reads at most registry.MaxManifestBytes and verifies them.
func readManifest(r io.Reader, d ocispec.Descriptor) ([]byte, error) {
	raw, err := readBounded(r, registry.MaxManifestBytes)
	if err != nil {
		return nil, fmt.Errorf("read manifest %s: %w", d.Digest, err)
	}
	if got := digest.FromBytes(raw); got != d.Digest {
		return nil, kind.Errorf(kind.Corrupt, "manifest %s: the bytes have digest %s", d.Digest, got)
	}
	return raw, nil
}

// Decode decodes JSON of unknown origin. Its errors are kind.Corrupt, name what was
// decoded, and speak of JSON, not of this program's types.
func Decode(what string, raw []byte, into any) error {
	err := json.Unmarshal(raw, into)
	var kinds *json.UnmarshalTypeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &kinds):
		where := ""
		if kinds.Field != "" {
			where = fmt.Sprintf(" in field %.100q", kinds.Field)
		}
		return kind.Errorf(kind.Corrupt, "%s: its JSON holds the wrong kind of value (%.40s%s)", what, kinds.Value, where)
	case len(raw) == 0:
		return kind.Errorf(kind.Corrupt, "%s: it is missing or empty, JSON belongs there", what)
	}
	return kind.Errorf(kind.Corrupt, "%s: it is no valid JSON: %w", what, err)
}

func readBounded(r io.Reader, maxBytes int64) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxBytes+1))
	if err != nil {
		return nil, err
	}
	if int64(len(raw)) > maxBytes {
		return nil, kind.Errorf(kind.Invalid, "larger than %d bytes", maxBytes)
	}
	return raw, nil
}

// fromRegistry is an image in a registry.
type fromRegistry struct {
	reference  string
	repository *registry.Repository
	root       ocispec.Descriptor
	raw        []byte
}

func openRegistry(ctx context.Context, reference string, client *registry.Client) (Source, error) {
	ref, err := client.Parse(reference)
	if err != nil {
		return nil, err
	}
	s := &fromRegistry{reference: reference, repository: client.Repository(ref.Context())}
	if s.root, s.raw, err = s.repository.Manifest(ctx, ref.Identifier()); err != nil {
		return nil, err
	}
	if inside := mediaTypeInside(s.raw); inside != "" && s.root.MediaType != inside {
		// The header is not covered by the digest, the field is.
		s.root.MediaType = inside
	}
	return s, nil
}

func (s *fromRegistry) String() string              { return s.reference }
func (s *fromRegistry) Root() ocispec.Descriptor    { return s.root }
func (s *fromRegistry) Close() error                { return nil }
func (s *fromRegistry) Repository() name.Repository { return s.repository.Name() }

func (s *fromRegistry) Manifest(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if d.Digest == s.root.Digest {
		return s.raw, nil
	}
	if err := SupportedDigest(d.Digest); err != nil {
		return nil, err
	}
	_, raw, err := s.repository.Manifest(ctx, d.Digest.String())
	return raw, err
}

func (s *fromRegistry) Blob(ctx context.Context, d ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	if err := SupportedDigest(d.Digest); err != nil {
		return nil, err
	}
	return s.repository.Blob(ctx, d.Digest, offset)
}

// mediaTypeInside is the mediaType field of a manifest or index, or what a document
// without one must be.
func mediaTypeInside(raw []byte) string {
	var probe struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Config        json.RawMessage `json:"config"`
	}
	if json.Unmarshal(raw, &probe) != nil {
		return ""
	}
	switch {
	case probe.SchemaVersion == 1:
		return "application/vnd.docker.distribution.manifest.v1+json"
	case probe.MediaType != "":
		return probe.MediaType
	case probe.Manifests != nil:
		return ocispec.MediaTypeImageIndex
	case probe.Config != nil:
		return ocispec.MediaTypeImageManifest
	}
	return ""
}
