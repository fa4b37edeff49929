package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/daemon"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/image/convert"
	"github.com/thaw-project/thaw/image/convert/progress"
	"github.com/thaw-project/thaw/image/filesystem"
	"github.com/thaw-project/thaw/image/filesystem/erofs"
	"github.com/thaw-project/thaw/image/filesystem/ext4"
	"github.com/thaw-project/thaw/kind"
)

func newImage() *cobra.Command {
	var where place
	cmd := group("image", "Convert images and work with converted ones",
		imageConvert(&where), imageList(&where), imageInspect(&where), imageRemove(&where), imagePrune(&where), imageDisks())
	where.register(cmd)
	return cmd
}

func imageConvert(where *place) *cobra.Command {
	var out output
	var quiet bool
	var mode, fs, size string
	var store storeFlags
	o := convert.Options{}
	cmd := &cobra.Command{
		Use:   "convert SOURCE DEST",
		Short: "Turn an OCI image into blocks and push a manifest that names them",
		Long: `Turn an OCI image into blocks and push a manifest that names them.

SOURCE is a registry reference, oci:DIR[:TAG], oci-archive:FILE[:TAG] or
docker-archive:FILE[:REF]. DEST is a registry reference or oci:DIR:TAG. It keeps the
source's config and layers, so that any client can still pull it.

Layers that an earlier conversion wrote are shared, not written again. A conversion
that was interrupted goes on where it was.

It asks the attacher of this machine for lvols, or the one that --attacher names, on
another machine: that has to know this machine's certificate as a converter's
(export.converters). What it writes then goes over NVMe/TCP, or with --card through
the drives of the card that is plugged into this machine. The table [convert] of the
configuration says the same.`,
		Example: `  thaw image convert registry.example/app:1 registry.example/app:1-thaw
  thaw image convert --mode overlaybd docker-archive:app.tar registry.example/app:1-bd
  thaw image convert --platform linux/amd64,linux/arm64 oci:./app:1 registry.example/app:1-thaw
  thaw image convert --attacher 10.0.0.1:7443 --certificate ci.pem --key ci.key --ca ca.pem registry.example/app:1 registry.example/app:1-thaw`,
		Args: exactArgs(2),
		RunE: func(cmd *cobra.Command, a []string) error {
			o.Source, o.Dest = a[0], a[1]
			var err error
			if o.Mode, err = block.ParseMode(mode); err != nil {
				return usage{err}
			}
			if fs == "" {
				fs = string(defaultFilesystem(o.Mode))
			}
			if o.Filesystem, err = block.ParseFilesystem(fs); err != nil {
				return usage{err}
			}
			if o.VirtualSizeBytes, err = daemon.ParseSize(size); err != nil {
				return usage{err}
			}
			o.Builders = map[block.Filesystem]filesystem.Builder{block.Erofs: erofs.New(), block.Ext4: &ext4.Builder{}}
			return runConvert(cmd, where, &store, o, &out, quiet)
		},
	}
	f := cmd.Flags()
	f.StringVar(&mode, "mode", string(block.ModeOverlayfs), "image mode: overlayfs (each layer apart) or overlaybd (merged, one block device per container)")
	f.StringVar(&fs, "filesystem", "", "file system in the blocks: ext4 or erofs (default erofs for overlayfs, ext4 for overlaybd)")
	f.StringVar(&size, "virtual-size", "100GiB", "size of the image's disk; thin, so it costs nothing")
	f.StringSliceVar(&o.Platforms, "platform", nil, "platforms of an index to convert, or 'all' (default this machine's)")
	f.IntVar(&o.GlobalLayers, "global-layers", 1, "how many of the lowest layers any repository may share; -1 for none")
	f.BoolVar(&o.PlainHTTP, "plain-http", false, "talk to registries without TLS")
	f.StringVar(&o.CAFile, "ca-file", "", "PEM file of certificates to trust besides the system's")
	f.StringVar(&o.DockerConfigDir, "docker-config", "", "directory of the config.json with credentials (default $DOCKER_CONFIG or ~/.docker)")
	f.StringVar(&o.SpoolDir, "spool-dir", "", "directory for layers in flight (default the temporary directory)")
	f.BoolVar(&quiet, "quiet", false, "no progress")
	store.register(cmd)
	out.register(cmd)
	oneOf(cmd, "mode", string(block.ModeOverlayfs), string(block.ModeOverlaybd))
	oneOf(cmd, "filesystem", string(block.Ext4), string(block.Erofs))
	return cmd
}

// defaultFilesystem is the one that measured faster, except that overlaybd is for a root
// file system that is one block device, which only ext4 gives: docs/benchmarks.md.
func defaultFilesystem(m block.Mode) block.Filesystem {
	if m == block.ModeOverlaybd {
		return block.Ext4
	}
	return block.Erofs
}

func runConvert(cmd *cobra.Command, where *place, store *storeFlags, o convert.Options, out *output, quiet bool) (err error) {
	client, done, err := store.client(cmd, where)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	o.Attacher = client
	closeBars := func() {}
	if !quiet {
		bars := progress.New(os.Stderr)
		o.Progress, closeBars = bars.Event, bars.Close
	}
	result, err := convert.Convert(cmd.Context(), o)
	closeBars() // before anything else is printed
	if err != nil {
		return interrupted{err, "nothing was pushed under " + o.Dest + "; finished blocks stay for the next run of the same command, or 'thaw image prune' deletes them"}
	}
	return out.print(cmd.OutOrStdout(), result, func(w *tabwriter.Writer) {
		for _, image := range result.Images {
			if len(result.Images) > 1 {
				fmt.Fprintln(w, image.Platform)
			}
			row(w, "LAYER", "BLOCK", "STATE", "SIZE", "WRITTEN")
			for i, l := range image.Layers {
				state := "written"
				if l.Reused {
					state = "shared"
				}
				row(w, i+1, l.Block, state, bytesText(l.AppliedBytes), bytesText(l.WrittenBytes))
			}
			row(w, "leaf", image.Soldier)
		}
		fmt.Fprintf(w, "%s@%s in %s\n", result.Dest, result.Digest, result.Duration.Round(time.Millisecond))
	})
}

func imageList(where *place) *cobra.Command {
	return listing("List converted images", "  thaw image list --json", func(cmd *cobra.Command, out *output) error {
		return where.call(cmd, func(c attacherv1.AttacherClient) error {
			r, err := c.ListImages(cmd.Context(), &attacherv1.ListImagesRequest{})
			if err != nil {
				return err
			}
			return out.print(cmd.OutOrStdout(), r.Images, func(w *tabwriter.Writer) {
				row(w, "IMAGE", "PLATFORM", "MODE", "FILESYSTEM", "BLOCKS", "CREATED")
				for _, i := range r.Images {
					row(w, i.Reference, i.Platform, i.Mode, i.Filesystem, len(i.Blocks), ageText(i.CreatedUnixNanos))
				}
				// What else fills the pool; of no importance when it cannot be told.
				p, err := c.PruneBlocks(cmd.Context(), &attacherv1.PruneBlocksRequest{DryRun: true})
				if err == nil && len(p.Blocks) > 0 {
					fmt.Fprintf(w, "and %s: 'thaw image prune' deletes them\n", count(len(p.Blocks), "block of no image", "blocks of no image"))
				}
			})
		})
	})
}

func imageInspect(where *place) *cobra.Command {
	var out output
	var platform string
	cmd := &cobra.Command{
		Use: "inspect DEST", Short: "Show a converted image and its blocks", Args: exactArgs(1),
		Example: "  thaw image inspect registry.example/app:1-thaw",
		RunE: func(cmd *cobra.Command, a []string) error {
			return where.call(cmd, func(c attacherv1.AttacherClient) error {
				i, err := c.GetImage(cmd.Context(), &attacherv1.GetImageRequest{Reference: convert.Reference(a[0]), Platform: platform})
				if err != nil {
					return unknown(err, "thaw image list")
				}
				if out.json {
					return out.print(cmd.OutOrStdout(), i, nil)
				}
				return printImage(cmd, c, i)
			})
		},
	}
	cmd.ValidArgsFunction = completeNames(where, imageNames)
	cmd.Flags().StringVar(&platform, "platform", "", "os/arch[/variant] when the image has several")
	out.register(cmd)
	return cmd
}

func printImage(cmd *cobra.Command, c attacherv1.AttacherClient, i *attacherv1.Image) error {
	var lvols []*attacherv1.Lvol
	for _, name := range i.Blocks {
		l, err := c.GetLvol(cmd.Context(), &attacherv1.GetLvolRequest{Name: name})
		if err != nil {
			return err
		}
		lvols = append(lvols, l)
	}
	table := output{}
	err := table.print(cmd.OutOrStdout(), nil, func(w *tabwriter.Writer) {
		row(w, "image", i.Reference)
		row(w, "source", i.Source)
		row(w, "digest", i.ManifestDigest)
		row(w, "platform", i.Platform)
		row(w, "mode", strings.Join([]string{i.Mode, i.Filesystem, bytesText(i.VirtualSizeBytes)}, ", "))
	})
	if err != nil {
		return err
	}
	return printLvols(cmd, &table, lvols)
}

func imageRemove(where *place) *cobra.Command {
	var out output
	var platform string
	cmd := &cobra.Command{
		Use: "remove DEST", Short: "Forget a converted image and free the blocks nothing else uses", Args: exactArgs(1),
		Long: `Forget a converted image and free the blocks that nothing else uses.

The manifest stays in the registry: nodes that pull it then unpack its ordinary
layers. An image that a node has attached is refused.`,
		Example: "  thaw image remove registry.example/app:1-thaw",
		RunE: func(cmd *cobra.Command, a []string) error {
			return where.call(cmd, func(c attacherv1.AttacherClient) error {
				ref := convert.Reference(a[0])
				if _, err := c.GetImage(cmd.Context(), &attacherv1.GetImageRequest{Reference: ref, Platform: platform}); kind.Of(err) == kind.NotFound {
					return unknown(err, "thaw image list")
				}
				r, err := c.DeleteImage(cmd.Context(), &attacherv1.DeleteImageRequest{Reference: ref, Platform: platform})
				if err != nil {
					return err
				}
				return out.print(cmd.OutOrStdout(), r, func(w *tabwriter.Writer) {
					for _, b := range r.DeletedBlocks {
						row(w, "deleted", b)
					}
					fmt.Fprintf(w, "forgot %s, %s\n", ref, count(len(r.DeletedBlocks), "block deleted", "blocks deleted"))
				})
			})
		},
	}
	cmd.ValidArgsFunction = completeNames(where, imageNames)
	cmd.Flags().StringVar(&platform, "platform", "", "only this platform")
	out.register(cmd)
	return cmd
}

func imagePrune(where *place) *cobra.Command {
	var out output
	var dryRun bool
	var age time.Duration
	cmd := &cobra.Command{
		Use: "prune", Short: "Delete the blocks that no image names", Args: noArgs,
		Long: `Delete complete blocks that no image names, no node has attached and nothing is a
clone of: what interrupted conversions left for their next run. A conversion that runs
now keeps what it builds on.`,
		Example: `  thaw image prune --dry-run
  thaw image prune --older-than 24h --json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if age < 0 {
				return usage{fmt.Errorf("--older-than %s: must not be negative", age)}
			}
			return where.call(cmd, func(c attacherv1.AttacherClient) error {
				r, err := c.PruneBlocks(cmd.Context(), &attacherv1.PruneBlocksRequest{MinAgeNanos: int64(age), DryRun: dryRun})
				if err != nil {
					return err
				}
				return out.print(cmd.OutOrStdout(), pruned{Blocks: append([]string{}, r.Blocks...), DryRun: dryRun}, func(w *tabwriter.Writer) {
					did, done := "deleted", "deleted"
					if dryRun {
						did, done = "would delete", "would be deleted"
					}
					for _, b := range r.Blocks {
						row(w, did, b)
					}
					fmt.Fprintln(w, count(len(r.Blocks), "block "+done, "blocks "+done))
				})
			})
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say which")
	cmd.Flags().DurationVar(&age, "older-than", 0, "leave blocks that were completed more recently, as 90m or 24h")
	out.register(cmd)
	return cmd
}

// pruned is what thaw image prune --json prints.
type pruned struct {
	Blocks []string `json:"blocks"`
	DryRun bool     `json:"dry_run"`
}

// unknown tells who asked for what is not there how to see what is.
func unknown(err error, list string) error {
	if errors.Is(err, kind.NotFound) {
		return fmt.Errorf("%w: '%s' shows what there is", err, list)
	}
	return err
}
