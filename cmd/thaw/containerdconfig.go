package main

import (
	"fmt"
	"io"
	"text/template"

	"github.com/spf13/cobra"

	"github.com/thaw-project/thaw/daemon"
	"github.com/thaw-project/thaw/kind"
)

var containerdConfigs = map[string]*template.Template{
	"2": template.Must(template.New("2").Parse(`# Add to containerd's configuration (/etc/containerd/config.toml), containerd 2.x.
version = 3

[proxy_plugins]
  [proxy_plugins.thaw]
    type = "snapshot"
    address = "{{.Socket}}"
    [proxy_plugins.thaw.exports]
      root = "{{.Root}}"
      enable_remote_snapshot_annotations = "true"

# For clients that pull through the transfer service (ctr, nerdctl).
[plugins."io.containerd.transfer.v1.local"]
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux"
    snapshotter = "overlayfs"
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux"
    snapshotter = "thaw"

# For Kubernetes: every pod of this node uses thaw; images that are not converted
# are unpacked as overlayfs does.
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "thaw"
  disable_snapshot_annotations = false
`)),
	"1": template.Must(template.New("1").Parse(`# Add to containerd's configuration (/etc/containerd/config.toml), containerd 1.6 and 1.7.
version = 2

[proxy_plugins]
  [proxy_plugins.thaw]
    type = "snapshot"
    address = "{{.Socket}}"
    [proxy_plugins.thaw.exports]
      root = "{{.Root}}"

# For Kubernetes: every pod of this node uses thaw; images that are not converted
# are unpacked as overlayfs does.
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "thaw"
  disable_snapshot_annotations = false
`)),
}

func printContainerdConfig(w io.Writer, major string, config daemon.Config) error {
	t, ok := containerdConfigs[major]
	if !ok {
		return usage{kind.Errorf(kind.Invalid, "containerd version %.20q: must be 1 or 2", major)}
	}
	p := config.Paths()
	return t.Execute(w, map[string]string{"Socket": p.SnapshotterSocket, "Root": p.Snapshotter})
}

func newContainerdConfig() *cobra.Command {
	var where place
	var major string
	cmd := &cobra.Command{
		Use:   "containerd-config",
		Short: "Print what to add to containerd's configuration",
		Example: `  thaw containerd-config > /etc/containerd/conf.d/thaw.toml
  thaw containerd-config --containerd-version 1`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := where.load()
			if err != nil {
				return err
			}
			if err := printContainerdConfig(cmd.OutOrStdout(), major, config); err != nil {
				return fmt.Errorf("print containerd configuration: %w", err)
			}
			return nil
		},
	}
	where.register(cmd)
	cmd.Flags().StringVar(&major, "containerd-version", "2", "containerd's major version: 1 or 2")
	return cmd
}
