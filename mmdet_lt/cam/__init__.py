"""Class activation maps of annotated objects: computed once, stored, pasted during training.

``masks`` and ``store`` need neither mmdet nor a model; the data samplers read CAM files through
them. ``gradcam`` and ``extract`` make the files, ``browse`` shows what is in them.
"""
