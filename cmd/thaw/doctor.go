package main

import (
	"context"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/thaw-project/thaw/doctor"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/node/mount"
	"github.com/thaw-project/thaw/node/present/choose"
	"github.com/thaw-project/thaw/node/present/fabrics"
	"github.com/thaw-project/thaw/node/present/nbd"
	"github.com/thaw-project/thaw/node/present/ublk"
)

func newDoctor() *cobra.Command {
	var where place
	var out output
	var containerd, snapshotter string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check kernel, containerd and permissions, and say what to do",
		Example: `  thaw doctor
  thaw doctor --containerd /run/k3s/containerd/containerd.sock --json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := where.load()
			if err != nil {
				return err
			}
			if containerd, err = filepath.Abs(containerd); err != nil {
				return err
			}
			p := config.Paths()
			presentations, details := probePresentations(cmd.Context())
			findings := doctor.Examine(cmd.Context(), doctor.Options{
				Root: config.Root, Run: config.Run, MetricsSocket: p.MetricSock, SnapshotterSocket: p.SnapshotterSocket,
				ContainerdSocket: containerd, Snapshotter: snapshotter,
				Presentations: presentations, PresentationDetails: details,
			})
			err = out.print(cmd.OutOrStdout(), findings, func(w *tabwriter.Writer) {
				for _, f := range findings {
					row(w, f.State, f.Check, f.Detail)
					if f.Advice != "" {
						row(w, "", "", "-> "+f.Advice)
					}
				}
			})
			if err != nil {
				return err
			}
			var failed []string
			for _, f := range findings {
				if f.State == doctor.Fail {
					failed = append(failed, f.Check)
				}
			}
			if len(failed) > 0 {
				return kind.Errorf(kind.Unsupported, "%s: %s", count(len(failed), "check failed", "checks failed"), strings.Join(failed, ", "))
			}
			return nil
		},
	}
	where.register(cmd)
	out.register(cmd)
	cmd.Flags().StringVar(&containerd, "containerd", "/run/containerd/containerd.sock", "containerd's socket")
	cmd.Flags().StringVar(&snapshotter, "snapshotter", "thaw", "the snapshotter's name in containerd's configuration")
	return cmd
}

// probePresentations asks each presentation whether it works on this machine.
func probePresentations(ctx context.Context) (unusable map[string]error, details map[string]string) {
	unusable, details = make(map[string]error), make(map[string]string)
	var transports []string
	var errs []error
	for _, transport := range []string{fabrics.TransportTCP, fabrics.TransportRDMA} {
		if err := fabrics.Probe(ctx, transport); err != nil {
			errs = append(errs, err)
		} else {
			transports = append(transports, transport)
		}
	}
	if details[choose.Fabrics] = "over " + strings.Join(transports, " and "); len(transports) == 0 {
		unusable[choose.Fabrics] = errs[0]
	} else {
		unusable[choose.Fabrics] = nil
	}
	unusable[choose.Ublk] = ublk.Probe()
	unusable[choose.NBD] = nbd.Probe(ctx)
	unusable[choose.Fuse] = nil
	for _, f := range mount.Probe() {
		switch {
		case f.Name == mount.FactFUSE && !f.OK, f.Name == mount.FactRoot && !f.OK:
			unusable[choose.Fuse] = kind.Errorf(kind.Unsupported, "%s", f.Detail)
		case f.Name == mount.FactFUSEResend && !f.OK:
			details[choose.Fuse] = "but a killed server loses requests: " + f.Detail
		}
	}
	return unusable, details
}
